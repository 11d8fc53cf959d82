"""Drawn traffic-sign-like images: the demo's data, generated from a seed, nothing to download.

A sign is a plate (triangle, square, pentagon, octagon or disc) with a border and a 5x5
glyph, seen at a random place, size and tilt before a blurred colour background, under
random light and with sensor noise. `classes` gives 10 classes: five plates, each with two
glyphs, so that colour and outline alone name a class only by half. With `open: true` every
image gets a plate, colours and a glyph of its own and no label: a stranger's unlabelled
pre-training set of the same kind of world.

Everything is drawn for a block of images at once, by signed distances.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tcore import seeds
from tcore.data.images import ImageSet

SIDES = (3, 4, 5, 8, 64)  # 64 sides are a disc at this size
PLATES = ("triangle", "square", "pentagon", "octagon", "disc")
HUES = (0.00, 0.60, 0.13, 0.35, 0.78)  # of the five plates' borders
BLOCK = 2000


@dataclass(frozen=True)
class Settings:
    train: int = 4000  # training images, in [1, inf)
    test: int = 1000  # test images, in [1, inf)
    image_size: int = 32  # height and width in pixels, in [2, inf)
    open: bool = False  # true: every image is a sign of its own, without labels
    seed: int = 0  # of the drawing, in [0, inf); a run's random seed does not change the data


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue, saturation, value)


def _glyphs(n: int, generator: Generator) -> Tensor:
    """n left-right symmetric 5x5 bitmaps with 8 to 17 of 25 cells on."""
    found = torch.empty(0, 5, 5)
    while len(found) < n:
        half = (torch.rand(4 * n, 5, 3, generator=generator) < 0.5).float()
        full = torch.cat([half, half[:, :, :2].flip(2)], 2)
        on = full.sum((1, 2))
        found = torch.cat([found, full[(on >= 8) & (on <= 17)]])
    return found[:n]


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=generator)


def _draw(
    sides: Tensor, border: Tensor, fill: Tensor, glyph: Tensor, size: int, generator: Generator
) -> Tensor:
    """Images (n, 3, size, size) in [0, 1]; sides (n,), border and fill (n, 3), glyph (n, 5, 5)."""
    n = len(sides)

    def per_image(low: float, high: float) -> Tensor:
        return _uniform((n, 1, 1), low, high, generator)

    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = x - per_image(-0.15, 0.15), y - per_image(-0.15, 0.15)
    tilt, scale = per_image(-0.25, 0.25), per_image(0.62, 0.92)
    u = (x * tilt.cos() + y * tilt.sin()) / scale
    v = (-x * tilt.sin() + y * tilt.cos()) / scale

    wedge = 2 * math.pi / sides.view(n, 1, 1)
    angle = torch.atan2(u, -v) % wedge - wedge / 2
    distance = torch.hypot(u, v) * angle.cos() / (wedge / 2).cos()  # 1 on the plate's outline
    soft = 0.5 * size * scale  # one pixel in units of distance
    plate = ((1 - distance) * soft + 0.5).clamp(0, 1).unsqueeze(1)
    inner = ((0.74 - distance) * soft + 0.5).clamp(0, 1).unsqueeze(1)
    reach = 2.3 + 1.1 * (sides.view(n, 1, 1) == 3)  # a triangle has less room
    grid = torch.stack([u * reach, v * reach], 3)
    mark = F.grid_sample(glyph.unsqueeze(1), grid, align_corners=False)

    light = _uniform((n, 3, 1, 1), 0.0, 0.25, generator) * _uniform((n, 1, 1, 1), 0, 1, generator)
    coarse = _uniform((n, 3, 4, 4), 0.1, 0.9, generator)
    image = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    fine = _uniform((n, 1, size // 2, size // 2), -0.15, 0.15, generator)
    image = image + F.interpolate(fine, (size, size), mode="bilinear", align_corners=False)
    jitter = _uniform((n, 3, 2), -0.1, 0.1, generator)
    image = image * (1 - plate) + plate * (border + jitter[:, :, 0]).view(n, 3, 1, 1)
    image = image * (1 - inner) + inner * (fill + jitter[:, :, 1]).view(n, 3, 1, 1)
    ink = (fill.mean(1) < 0.5).float().view(n, 1, 1, 1) * 0.9
    image = image * (1 - mark * inner) + mark * inner * ink
    gain = _uniform((n, 1, 1, 1), 0.45, 1.1, generator)
    noise = torch.empty_like(image).normal_(0, 0.03, generator=generator)
    return (image * gain + light + noise).clamp(0, 1)


def _classes(generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]:
    sides = torch.tensor(SIDES).repeat_interleave(2).float()
    border = torch.tensor([_rgb(h, 0.85, 0.75) for h in HUES]).repeat_interleave(2, 0)
    fill = torch.tensor([_rgb(0.12, 0.08, 0.95), _rgb(0.60, 0.7, 0.35)])[[0, 0, 1, 1, 0, 0, 1, 1, 0, 0]]
    names = tuple(f"{plate} {letter}" for plate in PLATES for letter in "AB")
    return sides, border, fill, _glyphs(10, generator), names


def _set(n: int, settings: Settings, split: str) -> ImageSet:
    generator = seeds.generator(settings.seed, "signs", "open" if settings.open else "classes", split)
    *looks, names = _classes(seeds.generator(0, "signs", "designs"))
    labels = torch.arange(n) % 10
    labels = labels[torch.randperm(n, generator=generator)]
    blocks = []
    for part in labels.split(BLOCK):
        if settings.open:
            m = len(part)
            sides = torch.tensor(SIDES)[torch.randint(len(SIDES), (m,), generator=generator)].float()
            border, fill = (_uniform((m, 3), 0, 1, generator) for _ in range(2))
            sides, border, fill, glyph = sides, border, fill, _glyphs(m, generator)
        else:
            sides, border, fill, glyph = (look[part] for look in looks)
        image = _draw(sides, border, fill, glyph, settings.image_size, generator)
        blocks.append((image * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1))
    return ImageSet(
        pixels=torch.cat(blocks).contiguous().numpy(),
        labels=np.full(n, -1) if settings.open else labels.numpy(),
        index=np.arange(n),
        class_names=() if settings.open else names,
        origin=f"drawn signs ({'open' if settings.open else 'classes'}), {split}, seed {settings.seed}",
    )


def load(settings: Settings, archives: dict) -> dict[str, ImageSet]:
    """The splits 'train' and 'test'."""
    return {"train": _set(settings.train, settings, "train"), "test": _set(settings.test, settings, "test")}
