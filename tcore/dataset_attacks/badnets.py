"""BadNets: an opaque checkered patch in the bottom right corner, relabelled to the target.

Gu, Dolan-Gavitt, Garg: BadNets, 2017. The 3x3 patch for 32 px is that of backdoor-toolbox
(`badnet_patch_32`): four white cells, five black ones, all applied. Poisons come from other
classes than the target's (the toolbox draws from all).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tcore import triggers
from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning import Poisoned, dirty_label
from tcore.triggers import Trigger

CELLS = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)


@dataclass(frozen=True)
class Settings:
    ratio: float = 0.2  # share of poisons in the target class after poisoning [T-Core, 5.1]
    size: int = 3  # side of the patch, at least 3, per 32 pixels of image side [backdoor-toolbox]
    opacity: float = 1.0  # of the patch, in steps of 0.001 [backdoor-toolbox]


def make_trigger(height: int, width: int, settings: Settings) -> Trigger:
    """The checker of `CELLS`, enlarged to the patch's side by repeating cells."""
    side = max(3, round(settings.size * min(height, width) / 32))
    if settings.size < 3 or side > min(height, width):
        raise InputError(
            f"badnets: size = {settings.size} makes a patch of {side} pixels on {width}x{height} images; "
            "it should be at least 3 and fit the image"
        )
    cell = torch.arange(side) * 3 // side
    mark = torch.zeros(3, height, width, dtype=torch.uint8)
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mark[:, -side:, -side:] = CELLS[cell][:, cell]
    mask[:, -side:, -side:] = True
    return {"mark": mark, "mask": mask, "opacity": triggers.permille(settings.opacity)}


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    return triggers.paste(images, **trigger)


def poison(
    images: ImageSet, target: int | None, settings: Settings, seed: int, encoder_trigger=None
) -> Poisoned:
    trigger = make_trigger(*images.tensor.shape[2:], settings)
    apply = partial(stamp, trigger=trigger)
    return dirty_label(images, target, settings.ratio, seed, apply, trigger, ("dataset_attacks", "badnets"))
