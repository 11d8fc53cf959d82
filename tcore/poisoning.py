"""What all data set attacks share: how many images, which ones, and what comes out."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pandas as pd
import torch

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.triggers import Stamp, Trigger


@dataclass(frozen=True)
class Poisoned:
    """A poisoned data set, and what only its attacker and an evaluator know of it.

    `truth`: `index`, `clean_label`, `is_poison`, `is_cover`, row by row as `images`. `trigger_of`:
    family and name of the attack whose `stamp` reads `trigger`.
    """

    images: ImageSet
    truth: pd.DataFrame
    trigger: Trigger
    target: int | None
    trigger_of: tuple[str, str]


def check_target(images: ImageSet, target: int | None) -> int:
    if target is None or not 0 <= target < images.num_classes:
        raise InputError(
            f"target = {target} is not a class of {images.origin}; "
            f"its {images.num_classes} classes are 0..{images.num_classes - 1}"
        )
    return target


def count(labels: np.ndarray, target: int, ratio: float, clean_label: bool = False) -> int:
    """How many images to poison for poisons to be the share `ratio` of the target class.

    Of n_t clean images: floor(r / (1 - r) * n_t) when poisons join the class from elsewhere,
    floor(r * n_t) when they are images of the class itself. Exact for the decimal that `ratio` is
    written as: 0.2 means 1/5.
    """
    share = Fraction(str(ratio))
    if not 0 <= share < 1:
        raise InputError(f"ratio = {ratio} should be at least 0 and below 1")
    size = int(np.count_nonzero(labels == target))
    if not size:
        raise InputError(f"no image is labelled with the target class {target}; choose another target")
    return math.floor((share if clean_label else share / (1 - share)) * size)


def choose(eligible: np.ndarray, n: int, seed: int, *names: str | int) -> np.ndarray:
    """`n` of the rows where the mask `eligible` is true, sorted.

    They are the first n of one permutation, so a larger n adds rows and removes none.
    """
    rows = np.flatnonzero(eligible)
    if n > len(rows):
        raise InputError(
            f"{n} images to choose for {'/'.join(map(str, names))} but {len(rows)} eligible; lower the ratio"
        )
    order = torch.randperm(len(rows), generator=seeds.generator(seed, *names)).numpy()
    return np.sort(rows[order[:n]])


def truth(images: ImageSet, poisons=(), covers=()) -> pd.DataFrame:
    """The table of `Poisoned`, from the clean images and the rows poisoned and covered."""
    rows = np.arange(len(images))
    return pd.DataFrame(
        {
            "index": images.index,
            "clean_label": images.labels,
            "is_poison": np.isin(rows, poisons),
            "is_cover": np.isin(rows, covers),
        }
    )


def dirty_label(
    images: ImageSet,
    target: int | None,
    ratio: float,
    seed: int,
    stamp: Stamp,
    trigger: Trigger,
    trigger_of: tuple[str, str],
) -> Poisoned:
    """Images of other classes, stamped and relabelled as the target, each in its own row."""
    target = check_target(images, target)
    n = count(images.labels, target, ratio)
    rows = choose(images.labels != target, n, seed, *trigger_of, "poisons")
    pixels, labels = images.pixels.copy(), images.labels.copy()
    for part in np.array_split(rows, len(rows) // 512 + 1):  # stamping widens to int32
        pixels[part] = stamp(images.select(part).tensor).permute(0, 2, 3, 1).numpy()
    labels[rows] = target
    return Poisoned(
        replace(images, pixels=pixels, labels=labels), truth(images, rows), trigger, target, trigger_of
    )
