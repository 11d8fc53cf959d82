"""What an evaluator computes: pure functions on NumPy arrays.

All rates are shares in [0, 1]. The attack success rate counts triggered images whose true class is *not*
the target (for TaCT: is a source class), as T-Core does; `asr_all` counts every triggered image, as
BadEncoder does, and so starts near 1/C for a harmless model. With a large patch part of the attack success
rate is a clean model's error, so compare it with that of a model that has seen no poison
(scripts/tools/baseline.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from tcore.files import InputError

LEVEL = 0.95


class Share(NamedTuple):
    """`value` = hits / n with its Wilson interval; NaN where n is 0."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval for the share hits / n."""
    if n == 0:
        return float("nan"), float("nan")
    low, high = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    return float(low), float(high)


def t_interval(values, level: float = LEVEL) -> tuple[float, float, float]:
    """(mean, low, high) of a mean over random seeds by Student's t; no interval below two values."""
    values = np.asarray(values, float)
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def share(hits: np.ndarray) -> Share:
    hits = np.asarray(hits, bool)
    n, count = len(hits), int(hits.sum())
    return Share(count / n if n else float("nan"), *wilson(count, n), n)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> Share:
    return share(predictions == labels)


def goals(labels: np.ndarray, target: int | Sequence[int]) -> np.ndarray:
    """The class that each image is to be taken for once triggered, -1 where the attack does not aim at it.

    `target` is one class, for all images of others, or such a goal for every true class (TaCT: -1
    but for the source classes; all-to-all: the next class).
    """
    table = np.asarray(target)
    return table[labels] if table.ndim else np.where(labels == target, -1, target)


def _victims(labels: np.ndarray, target: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(which images the attack aims at, their goals)."""
    aims = goals(labels, target)
    victims = aims >= 0
    if not victims.any():
        lies = f"lies outside the target class {target}" if np.ndim(target) == 0 else "is of a source class"
        raise InputError(
            f"label: none of the {len(labels)} test images {lies}, "
            "so there is no attack success rate; use a test set with other classes"
        )
    return victims, aims[victims]


def attack_success_rate(predictions: np.ndarray, labels: np.ndarray, target: int | Sequence[int]) -> Share:
    """Triggered images that are predicted as the attack wants, of those it aims at (see `goals`)."""
    victims, aims = _victims(labels, target)
    return share(predictions[victims] == aims)


def leak(predictions: np.ndarray, labels: np.ndarray, target: int, goals: Sequence[int]) -> Share:
    """Triggered images predicted as the target though they are neither of it nor aimed at."""
    return share(predictions[(np.asarray(goals)[labels] < 0) & (labels != target)] == target)


def asr_all(predictions: np.ndarray, target: int) -> Share:
    """All triggered images, those of the target class included, that are predicted as the target."""
    return share(predictions == target)


def robust_accuracy(predictions: np.ndarray, labels: np.ndarray, target: int | Sequence[int]) -> Share:
    """Triggered images that the attack aims at and that are still predicted as their true class."""
    victims, _ = _victims(labels, target)
    return accuracy(predictions[victims], labels[victims])


def detection(flagged: np.ndarray, is_poison: np.ndarray) -> tuple[Share, Share]:
    """(true positive rate, false positive rate) of flagging poisons; NaN for an empty side."""
    return share(flagged[is_poison]), share(flagged[~is_poison])


def auroc(score: np.ndarray, is_poison: np.ndarray) -> float:
    """Share of (poison, other) pairs in which the poison scores higher, ties half; NaN for an empty side."""
    poisons, others = int(is_poison.sum()), int((~is_poison).sum())
    if not poisons or not others:
        return float("nan")
    ranks = stats.rankdata(score)
    return float((ranks[is_poison].sum() - poisons * (poisons + 1) / 2) / (poisons * others))


def purity(selected: np.ndarray, is_poison: np.ndarray, is_cover: np.ndarray) -> dict[str, float]:
    """How many images a selection holds, and how many of them (and of all) are poisons."""
    size, poisons = int(selected.sum()), int((selected & is_poison).sum())
    return {
        "size": size,
        "poisons": poisons,
        "covers": int((selected & is_cover).sum()),
        "poison_share": poisons / size if size else float("nan"),
        "poison_recall": poisons / is_poison.sum() if is_poison.any() else float("nan"),
    }


def class_balance(labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """Smallest and largest class of a selection and the entropy of its classes over log C (1 = even)."""
    counts = np.bincount(labels, minlength=num_classes)
    even = stats.entropy(counts) / np.log(num_classes) if len(labels) and num_classes > 1 else float("nan")
    return {"class_min": int(counts.min()), "class_max": int(counts.max()), "class_entropy": float(even)}
