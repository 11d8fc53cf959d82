"""Figure 3: how fast the loss of clean and of poisoned samples falls while a head is trained.

Methods that suppress poisons (ABL, CBD) need them to be learnt faster than clean samples. The head is the
user's undefended one, from the same start through the same batches (`head` of the settings), and

    value = mean CE(head_e(z_i), y_i),   z_i features, y_i labels as received, dropout off

over the clean samples and over the poisons after e = 0..epochs passes, with Student's t interval over
samples. At e = head.epochs it is the user's head. Covers are in neither group. How many epochs the paper
shows is not known.
"""

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tcore.evaluation import metrics
from tcore.models import head as heads
from tcore.paper.figures import _drawing as drawing
from tcore.paper.figures._victim import Victim

CELLS = {"T2": ("badnets", "blended"), "T3": ("badencoder", "drupe")}
METHODS = ()
TITLE = "Figure 3: loss of clean and poisoned samples while the head is trained"
CAPTION = (
    "The paper reports that both fall alike with BadNets, clean ones faster with Blended, and poisons "
    "faster only in the first epochs of T3; compare which curve is below."
)


@dataclass(frozen=True)
class Settings:
    epochs: int = 10  # passes up to which the loss is followed, in [1, inf) [open]


def measure(victim: Victim, settings: dict) -> pd.DataFrame:
    """Two rows per epoch: `epoch`, `group` (clean, poison), `n`, `value`, `low`, `high`."""
    received, device = victim.received, victim.received.device
    features, labels = received.features, received.labels
    groups = {"clean": ~victim.is_poison & ~victim.is_cover, "poison": victim.is_poison}
    found = []

    @torch.no_grad()
    def look(head: heads.Head) -> None:
        loss, epoch = F.cross_entropy(head(features), labels, reduction="none"), len(found) // len(groups)
        for group, rows in groups.items():
            interval = metrics.t_interval(loss[rows].cpu().numpy())
            found.append([epoch, group, int(rows.sum()), *interval])

    head = heads.new_head(features.shape[1], received.classes, received.head, victim.seed, "head").to(device)
    look(head.eval())
    epochs = Settings(**settings["figure_3"]).epochs
    heads.fit_head(head, features, labels, epochs, victim.seed, "head", watch=look)
    return pd.DataFrame(found, columns=["epoch", "group", "n", "value", "low", "high"])


def draw(rows: pd.DataFrame) -> Figure:
    victims = drawing.victims(rows)
    figure, panels = drawing.panels(TITLE, CAPTION, len(victims))
    for axes, (name, own) in zip(panels, victims, strict=True):
        for group, colour, line in (("clean", drawing.GOOD, "-"), ("poison", drawing.BAD, "--")):
            points = drawing.over_seeds(own[own["group"] == group], "epoch", float("inf"))
            drawing.curve(axes, points, group, color=colour, linestyle=line)
        axes.set_title(name, fontsize=drawing.SMALL)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="epochs", ylabel="mean cross-entropy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.legend(panels[0])
    return figure
