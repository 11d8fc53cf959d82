"""What all data set attacks share: how many images, which ones, and what comes out.

Pixels are changed by integer arithmetic, so random seed and settings give the same bytes on every device. The
exception is `tis_aware`, whose trigger comes from a search in floating point.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning.triggers import Stamp, Trigger, rows_at_once

Owner = tuple[str, str]  # family and name of an attack


@dataclass(frozen=True)
class Poisoned:
    """A poisoned data set, and what only its attacker and an evaluator know of it.

    `truth`: `index`, `clean_label`, `is_poison`, `is_cover`, row by row as `images`. `trigger_of`:
    family and name of the attack whose `stamp` reads `trigger`. `goals`: for each true class the
    class that a triggered test image is to be taken for, -1 where the attack does not aim at it;
    None: the target for all classes but itself. `log`: what goes into the step's record besides.
    """

    images: ImageSet
    truth: pd.DataFrame
    trigger: Trigger
    target: int | None
    trigger_of: Owner
    goals: tuple[int, ...] | None = None
    log: dict = field(default_factory=dict)


def check_target(images: ImageSet, target: int | None) -> int:
    if target is None or not 0 <= target < images.num_classes:
        raise InputError(
            f"target = {target} is not a class of {images.origin}; "
            f"its {images.num_classes} classes are 0..{images.num_classes - 1}"
        )
    return target


def count(
    labels: np.ndarray,
    target: int | None,
    ratio: float | None,
    clean_label: bool = False,
    rate: float | None = None,
    poisons: int | None = None,
) -> int:
    """How many images to poison, said in one of three ways.

    `ratio` r is the share of poisons in the target class after poisoning (in every class for
    target None). Of its n_t clean images that makes floor(r / (1 - r) * n_t) where poisons join the
    class from elsewhere, floor(r * n_t) where they are images of the class itself. `rate` is a share
    of all images, rounded down; `poisons` is the number itself. Shares are exact for the decimals
    that they are written as: 0.2 means 1/5.
    """
    given = {"ratio": ratio, "rate": rate, "poisons": poisons}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(f"{name} = {value}" for name, value in given.items()) or "none is given"
        raise InputError(
            f"{found}: ratio, rate and poisons each say how many images to poison; "
            "set one of them and the others to null"
        )
    size = len(labels) if target is None else int(np.count_nonzero(labels == target))
    if not size:
        raise InputError(f"no image is labelled with the target class {target}; choose another target")
    name, value = given.popitem()
    if name == "poisons":
        if value < 0:
            raise InputError(f"poisons = {value} should be at least 0")
        return value
    share = Fraction(str(value))
    if not 0 <= share < 1:
        raise InputError(f"{name} = {value} should be at least 0 and below 1")
    if name == "rate":
        return math.floor(share * len(labels))
    return math.floor((share if clean_label or target is None else share / (1 - share)) * size)


def choose(eligible: np.ndarray, n: int, seed: int, *names: str | int) -> np.ndarray:
    """`n` of the rows where the mask `eligible` is true, sorted.

    They are the first n of one permutation, so a larger n adds rows and removes none.
    """
    rows = np.flatnonzero(eligible)
    if n > len(rows):
        raise InputError(
            f"{n} images to choose for {'/'.join(map(str, names))} but {len(rows)} eligible; "
            "lower ratio, rate, poisons or cover"
        )
    order = torch.randperm(len(rows), generator=seeds.generator(seed, *names)).numpy()
    return np.sort(rows[order[:n]])


def choose_poisons(
    images: ImageSet, target: int, settings, seed: int, owner: Owner, eligible=None, clean_label=False
) -> np.ndarray:
    """The rows to poison by `settings.ratio`, `rate` or `poisons`: of other classes than the target's,
    or those where the mask `eligible` is true."""
    n = count(images.labels, target, settings.ratio, clean_label, settings.rate, settings.poisons)
    return choose(images.labels != target if eligible is None else eligible, n, seed, *owner, "poisons")


def choose_covers(
    images: ImageSet, poisons: np.ndarray, cover: float, seed: int, owner: Owner, eligible=True
) -> np.ndarray:
    """floor(cover * number of poisons) rows of the rest, the target's class included as in
    backdoor-toolbox, or of those of the rest where the mask `eligible` is true."""
    share = Fraction(str(cover))
    if share < 0:
        raise InputError(f"cover = {cover} should be at least 0")
    rest = np.full(len(images), eligible)
    rest[poisons] = False
    return choose(rest, math.floor(share * len(poisons)), seed, *owner, "covers")


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


def poisoned(
    images: ImageSet,
    target: int | None,
    owner: Owner,
    trigger: Trigger,
    change: Callable[[Tensor, np.ndarray], Tensor],
    poisons: np.ndarray,
    covers: Sequence[int] | np.ndarray = (),
    goals: tuple[int, ...] | None = None,
) -> Poisoned:
    """The set with `change(pixels (n, 3, H, W), rows (n,))` applied to poisons and covers, in blocks.

    Poisons are relabelled as the target, or as `goals` says of their class; covers keep their label.
    Every image stays in its row.
    """
    pixels, labels = images.pixels.copy(), images.labels.copy()
    rows = torch.from_numpy(np.union1d(poisons, covers).astype(np.int64))
    for part in rows.split(rows_at_once(images.tensor)):
        changed = change(images.tensor[part], part.numpy())
        pixels[part.numpy()] = changed.permute(0, 2, 3, 1).numpy()
    labels[poisons] = target if goals is None else np.array(goals)[labels[poisons]]
    return Poisoned(
        replace(images, pixels=pixels, labels=labels),
        truth(images, poisons, covers),
        trigger,
        target,
        owner,
        goals,
    )


def dirty_label(
    images: ImageSet, target: int | None, settings, seed: int, stamp: Stamp, trigger: Trigger, owner: Owner
) -> Poisoned:
    """Images of other classes, stamped as at test time and relabelled as the target."""
    target = check_target(images, target)
    rows = choose_poisons(images, target, settings, seed, owner)
    return poisoned(images, target, owner, trigger, lambda pixels, _: stamp(pixels), rows)
