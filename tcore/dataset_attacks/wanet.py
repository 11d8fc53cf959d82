"""WaNet: a smooth, hardly visible warp, the same for every image, relabelled to the target.

Nguyen, Tran: WaNet, ICLR 2021. A field P ~ U[-1, 1] of k x k vectors, divided by its mean absolute value,
is enlarged to the image (bicubic, corners aligned); with I the identity grid on [-1, 1]:

    G = clamp(I + s P / H, -1, 1),   x' = x sampled at G bilinearly (corners aligned)

Covers ("noise mode") keep their label and are sampled at clamp(G + U[-1, 1] / H, -1, 1): each cover has
jitter of its own, of every pixel (backdoor-toolbox draws one for all). H becomes W for the horizontal
part of images that are not square. The field is drawn anew for every random seed. Poisons come from other
classes than the target's (backdoor-toolbox draws from all).

The original draws new samples in every epoch and trains on them itself; this attack poisons a data set, which
is weaker: the warp moves a pixel of a 32x32 image by 0.2 px on average. At the paper's ratio it does not
implant in short training here (docs/lab/implantation.md).

Arithmetic is fixed-point, so that all devices agree: places count 1/65536 pixel.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.poisoning import triggers
from tcore.poisoning.poisoned import Poisoned, check_target, choose_covers, choose_poisons, poisoned
from tcore.poisoning.triggers import Trigger

OWNER = ("dataset_attacks", "wanet")
UNIT = 2**16  # places per pixel


@dataclass(frozen=True)
class Settings:
    ratio: float | None = 0.2  # share of poisons in the target class after poisoning, in [0, 1) [T-Core, 5.1]
    rate: float | None = None  # instead of ratio (then null): share of poisons in the whole set, in [0, 1)
    poisons: int | None = None  # instead of ratio (then null): number of poisons, in [0, inf)
    cover: float = 0.25  # covers per poison, in [0, inf) [T-Core, App. B.3; WaNet: 2]
    points: int = 4  # k, control points along each side, in [2, inf) [WaNet]
    strength: float = 0.5  # s, in [0, inf) [WaNet]


def make_trigger(height: int, width: int, settings: Settings, seed: int) -> Trigger:
    """`places` (2, H, W) int32: the row and the column where each pixel is sampled, in 1/65536 pixel."""
    if settings.points < 2:
        raise InputError(f"wanet: points = {settings.points} should be at least 2")
    generator = seeds.generator(seed, "wanet", "field")
    size = (1, 2, settings.points, settings.points)
    field = 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1
    field = field / field.abs().mean()
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True)[0]
    places = []
    for axis, (side, shape) in enumerate(((height, (-1, 1)), (width, (1, -1)))):
        identity = torch.linspace(-1, 1, side, dtype=torch.float64).view(shape)
        grid = (identity + settings.strength * field[1 - axis] / side).clamp(-1, 1)  # field: (x, y)
        places.append(((grid + 1) / 2 * (side - 1) * UNIT).round().int())
    return {"places": torch.stack(places)}


def warp(images: Tensor, places: Tensor) -> Tensor:
    """`images` (N, 3, H, W) sampled bilinearly at `places` (N or 1, 2, H, W), rounded half up."""
    n, channels, height, width = images.shape
    rows, columns = places.to(images.device, torch.int64).flatten(2)[:, :, None].unbind(1)  # (N or 1, 1, H W)
    low, left = rows // UNIT, columns // UNIT
    high, right = (low + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, across = rows % UNIT, columns % UNIT
    both = down * across >> 10
    corners = (  # weights add up to 2^22, so that a sum of pixels fits int32
        (low, left, 2**22 - (down + across << 6) + both),
        (low, right, (across << 6) - both),
        (high, left, (down << 6) - both),
        (high, right, both),
    )
    flat = images.flatten(2)
    mixed = torch.full(flat.shape, 2**21, dtype=torch.int32, device=images.device)
    for row, column, weight in corners:
        mixed += flat.gather(2, (row * width + column).expand(n, channels, -1)) * weight.int()
    return (mixed >> 22).to(torch.uint8).view_as(images)


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    places = trigger["places"]
    triggers.check_size(images, (3, *places.shape[1:]))
    return warp(images, places[None])


def jitter(places: Tensor, index: np.ndarray, seed: int) -> Tensor:
    """Places (n, 2, H, W) of images with this `index`, each shaken by noise of its own."""
    _, height, width = places.shape
    noise = 2 * seeds.uniform(seed, *OWNER, "jitter", index=index, size=2 * height * width) - 1
    noise = torch.from_numpy(noise).view(-1, 2, height, width)
    sides = torch.tensor([height, width], dtype=torch.float64).view(2, 1, 1)
    shift = (noise * (sides - 1) / (2 * sides) * UNIT).round().int()  # U[-1, 1] / side of a grid 2 wide
    return torch.minimum((places + shift).clamp(min=0), ((sides - 1) * UNIT).int())


def poison(images: ImageSet, target: int | None, settings: Settings, seed: int) -> Poisoned:
    target = check_target(images, target)
    trigger = make_trigger(*images.tensor.shape[2:], settings, seed)
    poisons = choose_poisons(images, target, settings, seed, OWNER)
    covers = choose_covers(images, poisons, settings.cover, seed, OWNER)

    def change(pixels: Tensor, rows: np.ndarray) -> Tensor:
        changed, covered = stamp(pixels, trigger), np.isin(rows, covers)
        places = jitter(trigger["places"], images.index[rows[covered]], seed)
        changed[covered] = warp(pixels[covered], places)
        return changed

    return poisoned(images, target, OWNER, trigger, change, poisons, covers)
