"""BadNets: an opaque checkered patch in the bottom right corner, relabelled to the target.

Gu, Dolan-Gavitt, Garg: BadNets, 2017. The 3x3 patch for 32 px is that of backdoor-toolbox
(`badnet_patch_32`): four white cells, five black ones, all applied. Poisons come from other classes than
the target's (the toolbox draws from all).

All-to-all: images of every class are poisoned, label y becomes y + 1 (the last class the first), and
there is no target; `ratio` is then the share of poisons in every class, and success means the class after
the true one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning import triggers
from tcore.poisoning.poisoned import Poisoned, choose, count, dirty_label, poisoned
from tcore.poisoning.triggers import Trigger

OWNER = ("dataset_attacks", "badnets")
CELLS = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class after poisoning, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    size: int = 3  # side of the patch per 32 pixels of image side, in [3, inf) [backdoor-toolbox]
    opacity: float = 1.0  # of the patch, in steps of 0.001, in [0, 1] [backdoor-toolbox]
    all_to_all: bool = False  # true: every label moves to the next class, the target is not used


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


def poison(images: ImageSet, target: int | None, settings: Settings, seed: int) -> Poisoned:
    trigger = make_trigger(*images.tensor.shape[2:], settings)
    if not settings.all_to_all:
        return dirty_label(
            images, target, settings, seed, lambda pixels: stamp(pixels, trigger), trigger, OWNER
        )
    n = count(images.labels, None, settings.ratio, rate=settings.rate, poisons=settings.poisons)
    rows = choose(images.labels >= 0, n, seed, *OWNER, "poisons")
    goals = (*range(1, images.num_classes), 0)
    return poisoned(images, None, OWNER, trigger, lambda pixels, _: stamp(pixels, trigger), rows, goals=goals)
