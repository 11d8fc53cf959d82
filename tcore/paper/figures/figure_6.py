"""Figure 6: poisons among the largest losses of the target class after confusion training in seed expansion.

T-Core's own first round of expansion (`tcore/stages/expand.py`, its settings and random streams): the head
is trained on all but the seeds and confused, and CE under the received labels ranks the samples. Of the n_k
samples labelled as the target that are no seeds, the share `tail` with the largest losses:

    size = max(1, floor(tail n_k)),   value = poisons / size, with Wilson's interval

`ratio` is the share of poisons in the whole class (seeds included), which is how the paper counts: one
panel for each ratio that a pair has. The paper's curves count poisons; `poisons` does, the curves here are
shares, so that data sets of different sizes compare; up to three attacks in a panel have their interval as
a band, `low` and `high` are there for all. Attacks that leave an encoder clean (T2) only, as in the paper.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from tcore.evaluation import metrics
from tcore.paper.figures import _drawing as drawing
from tcore.paper.figures._declared import scale
from tcore.paper.figures._victim import Victim
from tcore.stages import expand

CELLS = {"T2": None}
METHODS = ("expand",)
TRUSTED = "tcore/seeds.parquet"
TITLE = "Figure 6: poisons among the largest losses of the target class after confusion"
CAPTION = (
    "The paper reports next to no poisons up to a tail of about 1 % and more from 5 % on, most for "
    "Adap-Patch, WaNet and Adap-Blend; compare where each curve leaves zero, and with chance (dotted)."
)


@dataclass(frozen=True)
class Settings:
    longest: float = 0.2  # the longest tail, as a share of the class, in (0, 1] [paper]
    step: float = 0.01  # from one tail to the next, in (0, 1] [open]


def largest(loss: np.ndarray, is_poison: np.ndarray, tail: float) -> dict[str, float]:
    """The share of poisons among the `tail` with the largest losses, at least one sample."""
    chosen = np.argsort(-loss, kind="stable")[: max(1, int(tail * len(loss) + 1e-9))]
    value, low, high, size = metrics.share(is_poison[chosen])
    poisons = is_poison[chosen].sum()
    return {"tail": tail, "size": size, "poisons": poisons, "value": value, "low": low, "high": high}


def measure(victim: Victim, settings: dict) -> pd.DataFrame:
    """A row per tail: `ratio`, `tail`, `size`, `poisons`, `value`, `low`, `high`."""
    received, own = victim.received, Settings(**settings["figure_6"])
    tails = scale("figure_6", own.step, own.longest)[1:]
    features, labels = received.features, received.labels
    confusion = expand.Settings(**settings["expand"])
    head = expand.confused_head(
        features, labels, received.clean, received.classes, confusion, received.head, victim.seed, 1
    )
    with torch.no_grad():
        loss = F.cross_entropy(head(features), labels, reduction="none")
    rows, labelled = victim.of_target, labels == victim.target
    loss, is_poison = loss[rows].cpu().numpy(), victim.is_poison[rows].cpu().numpy()
    ratio = float(victim.is_poison[labelled].float().mean())
    return pd.DataFrame([{"ratio": ratio} | largest(loss, is_poison, tail) for tail in tails])


def draw(rows: pd.DataFrame) -> Figure:
    rows = rows.assign(percent=(100 * rows["ratio"]).round().astype(int))
    groups = list(rows.groupby(["pretrain", "downstream", "percent"]))
    figure, panels = drawing.panels(TITLE, CAPTION, len(groups), height=2.6)
    for axes, ((pretrain, downstream, ratio), own) in zip(panels, groups, strict=True):
        attacks = list(own.groupby("dataset_attack"))
        few = len(attacks) <= 3
        for position, (attack, mine) in enumerate(attacks):
            colour = drawing.SEVERAL[position % len(drawing.SEVERAL)]
            drawing.curve(axes, drawing.over_seeds(mine, "tail"), attack, band=few, color=colour)
        axes.axhline(own["ratio"].mean(), color=drawing.MUTED, ls=":", lw=0.9)
        axes.set_title(
            f"{pretrain} → {downstream}\n{ratio} % of the class are poisons", fontsize=drawing.SMALL
        )
        top = max(own["ratio"].max(), own["high" if few else "value"].max())
        axes.set(xlim=(0, own["tail"].max()), ylim=(-0.03 * top, 1.5 * top))  # with room for the legend
        axes.set_xlabel("tail of the class, largest losses first")
        axes.xaxis.set_major_locator(MultipleLocator(0.05))
        drawing.percent(axes.xaxis)
        drawing.percent(axes.yaxis)
        drawing.legend(axes, loc="upper left", ncols=2, fontsize=6.5)
    return figure
