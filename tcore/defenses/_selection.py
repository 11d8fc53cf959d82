"""From scores to what is kept: rules that work on the scores of any detector.

The paper uses the same methods to remove samples (table 2) and to choose the cleanest ones (table 5),
so the score is one thing and the rule that cuts it another. Higher is more suspicious; equal
scores keep the order of the rows. Shares are rounded down, but a class keeps at least one sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    rule: str = "native"  # one of native, budget, cleanest: the method's own, drop the worst, keep the best
    share: float = 0.01  # how much `budget` drops or `cleanest` keeps, of all or of each class, in [0, 1]
    per_class: bool = True  # whether shares are taken of each class


def ranks(score: Tensor, labels: Tensor, per_class: bool = True) -> tuple[Tensor, Tensor]:
    """Places (n,) from the cleanest, 0, within a sample's class (or over all), and the class's size (n,)."""
    groups = labels if per_class else torch.zeros_like(labels)
    order = score.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels), device=labels.device)
    return place - (sizes.cumsum(0) - sizes)[groups], sizes[groups]


def cleanest(score: Tensor, labels: Tensor, share: float, per_class: bool = True) -> Tensor:
    """The `share` with the lowest scores, (n,) bool."""
    place, size = ranks(score, labels, per_class)
    return place < (share * size + 1e-9).long().clamp(min=1)


def worst(score: Tensor, labels: Tensor, count: int, cap: float = 1.0) -> Tensor:
    """In every class the `count` with the highest scores, at most `cap` of the class, (n,) bool."""
    place, size = ranks(score, labels)
    return place >= size - (cap * size).long().clamp(max=count)


def flagged(score: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """What `budget` or `cleanest` distrusts, (n,) bool."""
    if settings.rule == "cleanest":
        return ~cleanest(score, labels, settings.share, settings.per_class)
    place, size = ranks(score, labels, settings.per_class)
    return place >= (size - (settings.share * size + 1e-9).long()).clamp(min=1)
