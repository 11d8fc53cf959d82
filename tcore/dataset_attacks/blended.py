"""Blended: a full-size picture mixed faintly into the image, relabelled to the target.

Chen, Liu, Li, Lu, Song: Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning,
2017. The customary cartoon picture is not shipped; the default is a drawn colour field with the
same contrast (standard deviation about 70 a channel), which decides how well the attack works.
Poisons come from other classes than the target's (backdoor-toolbox draws from all).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tcore import seeds, triggers
from tcore.data.images import ImageSet
from tcore.files import InputError, require
from tcore.poisoning import Poisoned, dirty_label
from tcore.triggers import Trigger


@dataclass(frozen=True)
class Settings:
    ratio: float = 0.2  # share of poisons in the target class after poisoning [T-Core, 5.1]
    opacity: float = 0.2  # of the picture, in steps of 0.001 [backdoor-toolbox]
    pattern_seed: int = 0  # which colour field is drawn [ours]
    image: str | None = None  # path of a picture to blend in instead of the drawn one [ours]


def colour_field(height: int, width: int, seed: int) -> Tensor:
    """(3, H, W) uint8: smooth noise on three scales, every grey level equally often per channel.

    The same picture at every size. Uniform levels in 6..249 have standard deviation 70.
    """
    generator = seeds.generator(seed, "blended", "pattern")
    field = sum(
        F.interpolate(torch.randn(1, 3, n, n, generator=generator), (height, width), mode="bicubic")[0] / n
        for n in (4, 8, 16)
    )
    rank = field.flatten(1).argsort(1).argsort(1).view(3, height, width)
    return (6 + rank * 243 // max(height * width - 1, 1)).to(torch.uint8)


def picture(path: str, height: int, width: int) -> Tensor:
    """(3, H, W) uint8: the image file, stretched to the size."""
    try:
        with Image.open(require(path, "you: blended's setting `image` names it")) as file:
            pixels = np.array(file.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    except OSError as error:
        raise InputError(
            f"{path}: not a readable picture ({error}); see blended's setting `image`"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def make_trigger(height: int, width: int, settings: Settings) -> Trigger:
    if settings.image is None:
        mark = colour_field(height, width, settings.pattern_seed)
    else:
        mark = picture(settings.image, height, width)
    return {
        "mark": mark,
        "mask": torch.ones(1, height, width, dtype=torch.bool),
        "opacity": triggers.permille(settings.opacity),
    }


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    return triggers.paste(images, **trigger)


def poison(
    images: ImageSet, target: int | None, settings: Settings, seed: int, encoder_trigger=None
) -> Poisoned:
    trigger = make_trigger(*images.tensor.shape[2:], settings)
    apply = partial(stamp, trigger=trigger)
    return dirty_label(images, target, settings.ratio, seed, apply, trigger, ("dataset_attacks", "blended"))
