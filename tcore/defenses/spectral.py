"""Spectral Signatures (Tran et al., NeurIPS 2018): poisons stand out along a class's top singular direction.

For the samples of a class with centred features R (n_c, d) and v the top right singular vector of R,

    score = (R v)^2                              flag: the min(1.5 eps, n_c / 2) largest of every class

with eps = floor(poison_rate n), the number of poisons expected in the whole set. It needs a model
trained on everything, no clean data, and the poison rate, which a defender has to guess: the default
is the 1 % that implementations assume on clean data; the true rate belongs to an oracle variant. An oracle
that says 0, as in T1, drops nothing.

As in T-Core's table 2 the budget applies to every class, so the rate of false alarms is a choice and
not a finding: 1.5 eps C / n where no class is capped. v comes from the d x d scatter matrix in
float64, so it needs no decomposition of R. Scores of classes are not brought to one scale.

Cost: one forward pass of every sample through the head, on cached features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tcore.defenses import _selection as selection
from tcore.defenses._interface import Received

KIND = "detector"
CLEAN = False
NEEDS_NORM = False
ORACLE = ("poison_rate",)


@dataclass(frozen=True)
class Settings:
    poison_rate: float = 0.01  # share of poisons in the whole set, a guess, in [0, 1] [code: on clean data]
    layer: str = "penultimate"  # whose activations are looked at, one of encoder, hidden, penultimate [paper]
    factor: float = 1.5  # samples dropped per poison expected, in [0, inf) [paper]
    cap: float = 0.5  # a class loses no larger share than this, in [0, 1] [code]


def top_direction(centred: Tensor) -> Tensor:
    """The first right singular vector (d,) of centred rows (n, d) float64."""
    return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    features = received.layer(settings.layer).double()
    found = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for k in received.labels.unique():
        rows = received.labels == k
        centred = features[rows] - features[rows].mean(0)
        found[rows] = (centred @ top_direction(centred)).square()
    return found


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    poisons = int(settings.poison_rate * len(score) + 1e-9)
    return selection.worst(score, received.labels, int(settings.factor * poisons), settings.cap)
