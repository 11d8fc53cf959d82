"""Blended: a full-size picture mixed faintly into the image, relabelled to the target.

Chen, Liu, Li, Lu, Song: Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning,
2017. The customary cartoon picture is not shipped; the default is a drawn colour field with the
same contrast (standard deviation about 70 a channel), which decides how well the attack works.
Poisons come from other classes than the target's (backdoor-toolbox draws from all).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.poisoning import marks, triggers
from tcore.poisoning.poisoned import Poisoned, dirty_label
from tcore.poisoning.triggers import Trigger

OWNER = ("dataset_attacks", "blended")


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class after poisoning, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    opacity: float = 0.2  # of the picture, in steps of 0.001, in [0, 1] [backdoor-toolbox]
    pattern_seed: int = 0  # which colour field is drawn, in [0, inf) [ours]
    image: str | None = None  # path of a picture to blend in instead of the drawn one [ours]


def make_trigger(height: int, width: int, settings: Settings) -> Trigger:
    return {
        "mark": marks.picture(settings.image, settings.pattern_seed, height, width),
        "mask": torch.ones(1, height, width, dtype=torch.bool),
        "opacity": triggers.permille(settings.opacity),
    }


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    return triggers.paste(images, **trigger)


def poison(images: ImageSet, target: int | None, settings: Settings, seed: int) -> Poisoned:
    trigger = make_trigger(*images.tensor.shape[2:], settings)
    return dirty_label(images, target, settings, seed, lambda pixels: stamp(pixels, trigger), trigger, OWNER)
