"""SIG: a faint wave over images of the target class, whose label stays right (clean label).

Barni, Kallas, Tondi: A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning,
2019. For column j of an image of width W, the same in all rows and channels:

    x' = clamp(x + Delta sin(2 pi j f / W), 0, 255), rounded half up

Delta counts grey levels; 30 and f = 6 are backdoor-toolbox's (BackdoorBench: 40). The same wave in
training and at test time. There are at most as many poisons as images of the target class.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.poisoning import triggers
from tcore.poisoning.poisoned import Poisoned, check_target, choose_poisons, poisoned
from tcore.poisoning.triggers import Trigger

OWNER = ("dataset_attacks", "sig")


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    delta: float = 30.0  # height of the wave in grey levels, in [0, 255] [backdoor-toolbox]
    frequency: float = 6.0  # waves across the image's width, in (0, inf) [backdoor-toolbox]


def make_trigger(height: int, width: int, settings: Settings) -> Trigger:
    """`wave` (3, H, W) int16: grey levels to add. Rounding before adding is the same, as pixels are whole."""
    phase = 2 * np.pi * np.arange(width) * settings.frequency / width
    wave = np.floor(np.round(settings.delta * np.sin(phase), 9) + 0.5).astype(np.int16)
    return {"wave": torch.from_numpy(wave).expand(3, height, width).clone()}


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    wave = trigger["wave"].to(images.device)
    triggers.check_size(images, wave.shape)
    return (images + wave).clamp(0, 255).to(torch.uint8)


def poison(images: ImageSet, target: int | None, settings: Settings, seed: int) -> Poisoned:
    target = check_target(images, target)
    trigger = make_trigger(*images.tensor.shape[2:], settings)
    own = images.labels == target
    rows = choose_poisons(images, target, settings, seed, OWNER, own, clean_label=True)
    return poisoned(images, target, OWNER, trigger, lambda pixels, _: stamp(pixels, trigger), rows)
