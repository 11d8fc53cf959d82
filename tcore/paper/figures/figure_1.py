"""Figure 1: features of the target class in front of the last layer of a head that was trained on everything.

A head on a frozen encoder can only pass on what the encoder's features hold, so poisons need not be
outliers of their class, which detectors of latent separation need. Activations (n_k, d) of the head's
second layer, after its ReLU, for all samples labelled as the target, centred on their mean:

    x, y         their first two principal components, x along the largest singular direction
    distance     Euclidean norm in all d dimensions

AUROC over poisons against clean samples of the distance and of x^2, which is the score of spectral
signatures. The paper does not say how it projects; here: principal components of the class, in float64.
"""

import pandas as pd
import torch
from matplotlib.figure import Figure

from tcore.evaluation import metrics
from tcore.paper.figures import _drawing as drawing
from tcore.paper.figures._victim import Victim

CELLS = {"T2": ("badnets", "blended")}
METHODS = ()
TITLE = "Figure 1: the target class in front of the head's last layer"
CAPTION = (
    "The paper reports that poisons are no outliers of their class when only a head is trained; compare "
    "whether the AUROCs stay near or below 0.5. One random seed is drawn, the AUROCs are means over all."
)


def measure(victim: Victim, settings: dict) -> pd.DataFrame:
    """A row per sample of the target class: `index`, `is_poison`, `x`, `y`, `distance`."""
    rows = victim.of_target
    features = victim.received.layer("penultimate")[rows].double()
    centred = features - features.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    x, y = (centred @ directions).T.cpu().numpy()
    return pd.DataFrame(
        {
            "index": victim.train.index[rows.cpu().numpy()],
            "is_poison": victim.is_poison[rows].cpu().numpy(),
            "x": x,
            "y": y,
            "distance": centred.norm(dim=1).cpu().numpy(),
        }
    )


def aurocs(rows: pd.DataFrame) -> pd.Series:
    """`distance` and `spectral` of one victim."""
    is_poison = rows["is_poison"].to_numpy(bool)
    scores = {"distance": rows["distance"], "spectral": rows["x"] ** 2}
    return pd.Series({name: metrics.auroc(score.to_numpy(), is_poison) for name, score in scores.items()})


def draw(rows: pd.DataFrame) -> Figure:
    victims = drawing.victims(rows)
    figure, panels = drawing.panels(TITLE, CAPTION, len(victims), height=2.7)
    for axes, (name, own) in zip(panels, victims, strict=True):
        found = own.groupby("seed")[["x", "distance", "is_poison"]].apply(aurocs).mean()
        shown = own[own["seed"] == own["seed"].min()]
        for is_poison, colour, label in ((False, drawing.MUTED, "clean"), (True, drawing.BAD, "poison")):
            dots = shown[shown["is_poison"] == is_poison]
            axes.scatter(dots["x"], dots["y"], s=6, c=colour, alpha=0.6, linewidths=0, label=label)
        axes.set_title(name, fontsize=drawing.SMALL)
        text = f"AUROC: distance {found['distance']:.2f}, spectral {found['spectral']:.2f}"
        axes.set_xlabel(text, fontsize=drawing.SMALL)
        axes.set(xticks=[], yticks=[])
    drawing.legend(panels[0])
    return figure
