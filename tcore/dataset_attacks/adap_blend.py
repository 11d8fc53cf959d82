"""Adap-Blend: a blended picture of which every training image shows another half.

Qi, Xie, Li, Mahloujifar, Mittal: Revisiting the Assumption of Latent Separability, ICLR 2023. The image
is cut into 4x4 blocks. Of each poison and each cover, 8 blocks drawn at random show the picture at
opacity 0.15; poisons get the target's label, covers keep theirs, so that the trigger does not set poisons
apart in feature space. At test time the whole picture is shown at 0.2. Block edges at sides not divisible
by 4 are rounded down. Poisons come from other classes than the target's (backdoor-toolbox draws from all).

The picture is `blended`'s drawn colour field or the user's.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.dataset_attacks import blended
from tcore.files import InputError
from tcore.poisoning import triggers
from tcore.poisoning.poisoned import Poisoned, check_target, choose_covers, choose_poisons, poisoned
from tcore.poisoning.triggers import Trigger

OWNER = ("dataset_attacks", "adap_blend")


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class after poisoning, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    cover: float = 0.25  # covers per poison, in [0, inf) [T-Core, App. B.3; Adap-Blend: 1]
    opacity: float = 0.15  # of the picture in training, in steps of 0.001, in [0, 1] [Adap-Blend]
    test_opacity: float = 0.2  # of the picture at test time, in steps of 0.001, in [0, 1] [Adap-Blend]
    blocks: int = 4  # blocks along each side, in [1, inf) [Adap-Blend]
    visible: int = 8  # blocks that a training image shows, in [0, inf) [Adap-Blend]
    pattern_seed: int = 0  # which colour field is drawn, in [0, inf) [ours]
    image: str | None = None  # path of a picture to blend in instead of the drawn one [ours]


def make_trigger(height: int, width: int, settings: Settings) -> Trigger:
    """Blended's, at the opacity of test time."""
    whole = blended.Settings(
        opacity=settings.test_opacity, pattern_seed=settings.pattern_seed, image=settings.image
    )
    return blended.make_trigger(height, width, whole)


stamp = blended.stamp


def masks(height: int, width: int, index: np.ndarray, settings: Settings, seed: int) -> Tensor:
    """(n, 1, H, W) bool: the blocks that the images with this `index` show in training."""
    side, visible = settings.blocks, settings.visible
    if not 1 <= side <= min(height, width) or not 0 <= visible <= side**2:
        raise InputError(
            f"adap_blend: blocks = {side} and visible = {visible} do not fit {width}x{height} images; "
            f"blocks is at most the image's side, visible at most blocks times blocks"
        )
    draws = torch.from_numpy(seeds.uniform(seed, *OWNER, "blocks", index=index, size=side**2))
    shown = draws.argsort(1).argsort(1) < visible  # (n, blocks * blocks)
    row, column = (torch.arange(n) * side // n for n in (height, width))
    return shown[:, row[:, None] * side + column][:, None]


def poison(images: ImageSet, target: int | None, settings: Settings, seed: int) -> Poisoned:
    target = check_target(images, target)
    size = images.tensor.shape[2:]
    trigger = make_trigger(*size, settings)
    opacity = triggers.permille(settings.opacity)
    poisons = choose_poisons(images, target, settings, seed, OWNER)
    covers = choose_covers(images, poisons, settings.cover, seed, OWNER)

    def change(pixels: Tensor, rows: np.ndarray) -> Tensor:
        mask = masks(*size, images.index[rows], settings, seed)
        return triggers.paste(pixels, trigger["mark"], mask, opacity)

    return poisoned(images, target, OWNER, trigger, change, poisons, covers)
