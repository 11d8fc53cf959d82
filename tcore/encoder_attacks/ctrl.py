"""CTRL: two frequencies in the colour of unlabelled images of the target class, nearly invisible.

Li, Pang, Xi, Du, Ji, Chen, Wang: An Embarrassingly Simple Backdoor Attack on Self-supervised Learning,
ICCV 2023. In YUV, and in the orthonormal two-dimensional DCT-II of windows of 32x32 pixels, the coefficients
(b, b) of U and V grow by a magnitude m, for b in two bands:

    R += 1.14 dV     G += -0.396 dU - 0.581 dV     B += 2.029 dU     dU = dV = IDCT(m [i = j in bands])

which does not depend on the image: at m = 100 it is 5.0, 4.3 and 9.0 grey levels (rms) in R, G and B.
Augmentations are meant to leave it, so that it becomes what views of the class share. Deviations: the
image-independent sum is added, in thousandths of a grey level and rounded once, where the original
transforms every image there and back with rounded matrices; poisons are drawn at random, where the
original takes the first ones. Like the original, it takes all of a class that has fewer images than `rate`
asks for; the record's `wanted` beside `poisons` says so.

The attack is fragile (docs/lab/encoder-attacks.md): a stem with stride 2 cannot see bands near the highest
one, odd bands change sign when an image is flipped, and success swings between epochs and random seeds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.fft import idctn
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.encoder_attacks._unlabelled import poison_class
from tcore.files import InputError
from tcore.poisoning.poisoned import Poisoned
from tcore.poisoning.triggers import Trigger


@dataclass(frozen=True)
class Settings:
    rate: float = 0.01  # poisons as a share of the pre-training set, in [0, 1] [CTRL]
    source: str = "pretraining"  # of the poisons, one of pretraining, downstream: in place or added [ours]
    window: int = 32  # side of the DCT's windows, which tile the image, in [1, inf) [CTRL]
    bands: tuple[int, int] = (15, 31)  # b of the changed coefficients (b, b), in [0, inf) [CTRL]
    magnitude: float = 100.0  # added to them in training, in [0, inf); CTRL's paper: 50 [CTRL's code]
    magnitude_test: float = 100.0  # added to them at test time, in [0, inf) [CTRL]


def pattern(height: int, width: int, window: int, bands: tuple[int, int], magnitude: float) -> np.ndarray:
    """What is added to an image (3, H, W), in grey levels."""
    if window < 1 or height % window or width % window:
        raise InputError(f"ctrl: windows of {window} pixels do not tile {width}x{height} images; set window")
    if not all(0 <= band < window for band in bands):
        raise InputError(f"ctrl: bands {tuple(bands)} should lie in 0..{window - 1}, below the window")
    spectrum = np.zeros((window, window))
    spectrum[list(bands), list(bands)] = magnitude
    wave = np.tile(idctn(spectrum, norm="ortho"), (height // window, width // window))
    return np.array([1.14, -0.396 - 0.581, 2.029])[:, None, None] * wave


def make_trigger(height: int, width: int, settings: Settings, seed: int) -> Trigger:
    """The pattern at test (`added`) and in training (`added_train`), int32, thousandths of a grey level."""
    strengths = {"added": settings.magnitude_test, "added_train": settings.magnitude}
    return {
        name: torch.from_numpy(
            np.rint(1000 * pattern(height, width, settings.window, settings.bands, m)).astype(np.int32)
        )
        for name, m in strengths.items()
    }


def add(images: Tensor, added: Tensor) -> Tensor:
    """images (N, 3, H, W) uint8 + added / 1000, rounded half up and clamped."""
    if images.shape[1:] != added.shape:
        raise InputError(
            f"the trigger is {tuple(added.shape)} (channels, height, width), the images are "
            f"{tuple(images.shape[1:])}; make the trigger anew at their size"
        )
    total = images.int() * 1000 + added.to(images.device)
    return ((total + 500).clamp(0, 255_999) // 1000).to(torch.uint8)


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    return add(images, trigger["added"])


def poison_images(
    images: ImageSet, downstream: ImageSet, target: int, trigger: Trigger, settings: Settings, seed: int
) -> Poisoned:
    wanted = int(settings.rate * len(images))
    poisoned, truth = poison_class(
        "ctrl",
        images,
        downstream,
        target,
        settings.source,
        lambda size: min(wanted, size),
        lambda chosen: add(chosen, trigger["added_train"]),
        seed,
    )
    return Poisoned(poisoned, truth, trigger, target, ("encoder_attacks", "ctrl"), log={"wanted": wanted})
