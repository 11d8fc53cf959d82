"""Figure 2: who has the smallest losses after confusion training (CT).

Where a whole network is trained, CT leaves poisons alone with a small loss. Losses here are CE under the
received labels by the network of CT's last confusion (`ct.last_network`, a head on the frozen encoder),
with CT's own settings and the clean samples that the scenario grants it, which are left out, as they are
known. Of the n_k other samples labelled as the target, the share `part` with the smallest losses:

    size = round(part n_k),   value = clean ones / size, with Wilson's interval

The paper does not say whether it ranks all classes or the target's; here the target's, where poisons are
many enough for the share of clean samples to tell something. Covers count as clean. Part 1 is the class as
it is.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from tcore.defenses import ct
from tcore.defenses._interface import in_blocks
from tcore.evaluation import metrics
from tcore.paper.figures import _drawing as drawing
from tcore.paper.figures._declared import scale
from tcore.paper.figures._victim import Victim

CELLS = {"T2": ("badnets", "blended")}
METHODS = ("ct",)
TRUSTED = "ct/given/granted.parquet"
TITLE = "Figure 2: the smallest losses of the target class after confusion training"
CAPTION = (
    "The paper reports that the 40 % with the smallest losses are mostly clean, so that CT has no poisons "
    "to find; compare the curve at 40 % with chance (dotted) and with a perfect separation (dashed)."
)


@dataclass(frozen=True)
class Settings:
    step: float = 0.01  # from one share to the next, up to 1, in (0, 1] [open]


def smallest(loss: np.ndarray, is_poison: np.ndarray, part: float) -> dict[str, float]:
    """The share of clean samples among the `part` with the smallest losses, at least one."""
    chosen = np.argsort(loss, kind="stable")[: max(1, round(part * len(loss)))]
    poisons = is_poison[chosen]
    value, low, high, size = metrics.share(~poisons)
    return {"part": part, "size": size, "poisons": poisons.sum(), "value": value, "low": low, "high": high}


def measure(victim: Victim, settings: dict) -> pd.DataFrame:
    """A row per share: `part`, `size`, `poisons`, `value`, `low`, `high`, `ratio` (of poisons at part 1)."""
    received = victim.received
    parts = scale("figure_2", Settings(**settings["figure_2"]).step, 1)[1:]
    network = ct.last_network(received, ct.Settings(**settings["ct"]), victim.seed)
    with torch.no_grad():
        loss = F.cross_entropy(in_blocks(network, received.inputs), received.labels, reduction="none")
    rows = victim.of_target
    loss, is_poison = loss[rows].cpu().numpy(), victim.is_poison[rows].cpu().numpy()
    found = [smallest(loss, is_poison, part) for part in parts]
    return pd.DataFrame(found).assign(ratio=is_poison.mean())


def draw(rows: pd.DataFrame) -> Figure:
    victims = drawing.victims(rows)
    figure, panels = drawing.panels(TITLE, CAPTION, len(victims))
    for axes, (name, own) in zip(panels, victims, strict=True):
        points = drawing.over_seeds(own, "part")
        poisons = own["ratio"].mean()
        parts = points.index.to_numpy()
        drawing.curve(axes, points, "clean among them", color=drawing.GOOD)
        perfect = np.maximum(0, 1 - poisons / parts)
        axes.plot(parts, perfect, color=drawing.INK, ls="--", lw=0.9, label="separated", zorder=3)
        axes.axhline(1 - poisons, color=drawing.MUTED, ls=":", lw=0.9, label="chance")
        axes.axvline(0.4, color=drawing.RULE, lw=0.8, zorder=0)
        axes.set_title(name, fontsize=drawing.SMALL)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="share of the class, smallest losses first")
        drawing.percent(axes.xaxis)
        drawing.percent(axes.yaxis)
    drawing.legend(panels[0])
    return figure
