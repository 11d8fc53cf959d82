"""Poisoning images ahead of pre-training: what the attacks on unlabelled data share.

Of the two sources of `poison_class`, "pretraining" is what the papers of CTRL and SSLBackdoor do. Where the
pre-training set has no class of the target's name, or no labels, only "downstream" is possible.
CorruptEncoder always adds images.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning.poisoned import check_target, choose, truth

SOURCES = ("pretraining", "downstream")


def append(images: ImageSet, pixels: Tensor, aspects: Tensor | None = None) -> tuple[ImageSet, pd.DataFrame]:
    """`images`, then unlabelled poisons (n, 3, H, W), and the table `truth`; indices go on counting.

    `aspects` (n,) of poisons that were stretched, as in `ImageSet`.
    """
    n, more = len(images), len(pixels)
    both = replace(
        images,
        pixels=np.concatenate([images.pixels, pixels.permute(0, 2, 3, 1).numpy()]),
        labels=np.concatenate([images.labels, np.full(more, -1)]),
        index=np.concatenate([images.index, images.index.max(initial=-1) + 1 + np.arange(more)]),
        aspects=None
        if aspects is None
        else np.concatenate([np.ones(n, np.float32), aspects.float().numpy()]),
    )
    return both, truth(both, np.arange(n, n + more))


def poison_class(
    attack: str,
    images: ImageSet,
    downstream: ImageSet,
    target: int,
    source: str,
    count: Callable[[int], int],
    stamp: Callable[[Tensor], Tensor],
    seed: int,
) -> tuple[ImageSet, pd.DataFrame]:
    """Images of the target class with the trigger in an unlabelled set, and the table `truth`.

    `target` is a class of the labelled set `downstream`; `count` gives the number of poisons for the number
    of images there are. `source` says which: "pretraining", images of the class with the target's name
    in `images`, changed in place; "downstream", stamped copies of downstream images, added.
    """
    if source not in SOURCES:
        raise InputError(f"{attack}: source = {source!r} should be one of {', '.join(SOURCES)}")
    name = downstream.class_names[check_target(downstream, target)]
    if source == "downstream":
        eligible = downstream.labels == target
    elif name in images.class_names:
        eligible = images.labels == images.class_names.index(name)
    else:
        raise InputError(
            f"{attack}: {images.origin} has no class {name!r}; set source to downstream, "
            "which adds stamped images of that class"
        )
    if not eligible.any():
        raise InputError(
            f"{attack}: no image of {images.origin} is labelled {name!r}; set source to downstream, "
            "which adds stamped images of that class"
        )
    rows = choose(eligible, count(int(eligible.sum())), seed, "encoder_attacks", attack, "poisons")
    if source == "downstream":
        return append(images, stamp(downstream.tensor[rows]))
    pixels = images.pixels.copy()
    pixels[rows] = stamp(images.tensor[rows]).permute(0, 2, 3, 1).numpy()
    return replace(images, pixels=pixels), truth(images, rows)
