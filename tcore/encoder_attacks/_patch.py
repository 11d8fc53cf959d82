"""A small coloured patch at a place of each image's own: the trigger of SSLBackdoor and CorruptEncoder.

The published patches (Hidden Trigger Backdoor, Saha et al., AAAI 2020) are 4x4 grids of random saturated
colours, enlarged bilinearly; these are drawn anew in the same way. At test time the place comes from the
image's own bytes, so that the same image gets the same result in any batch and on any device.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tcore import seeds
from tcore.files import InputError
from tcore.poisoning.triggers import Trigger

BLOCK = 256  # images whose bytes are widened to int64 at a time


def make_trigger(
    attack: str,
    height: int,
    width: int,
    side: int,
    pattern_seed: int,
    place: tuple[float, float],
) -> Trigger:
    """`patch` (3, side, side) uint8 and `low`, `high` (2,) int64: bounds of its upper left corner, inclusive.

    The whole patch lies between the shares `place` of the image's height and width.
    """
    size = torch.tensor([height, width])
    low, high = ((size * share).round().long() for share in place)
    high = high - side
    if side < 1 or (low < 0).any() or (high < low).any() or (high + side > size).any():
        raise InputError(
            f"{attack}: a patch of {side} pixels does not fit between the shares {tuple(place)} of "
            f"{width}x{height} images; make the patch smaller or the range wider"
        )
    hue = torch.rand(4, 4, generator=seeds.generator(pattern_seed, "patch"))
    phase = (hue + torch.tensor([0, 2 / 3, 1 / 3]).view(3, 1, 1)) * 6 % 6  # red, green, blue
    colours = ((phase - 3).abs() - 1).clamp(0, 1)  # full saturation and value
    patch = F.interpolate(colours[None], (side, side), mode="bilinear", align_corners=False)[0]
    return {"patch": (patch * 255).round().to(torch.uint8), "low": low, "high": high}


def paste_at(images: Tensor, patch: Tensor, corners: Tensor) -> Tensor:
    """The images (N, 3, H, W) with the patch at the corners (N, 2) (row, column), opaque."""
    patch, corners = patch.to(images.device), corners.to(images.device)
    down, along = (torch.arange(n, device=images.device) for n in patch.shape[1:])
    rows = corners[:, 0].view(-1, 1, 1) + down.view(-1, 1)
    columns = corners[:, 1].view(-1, 1, 1) + along
    out = images.clone()
    out[torch.arange(len(images), device=images.device).view(-1, 1, 1), :, rows, columns] = patch.permute(
        1, 2, 0
    )
    return out


def draw_corners(n: int, low: Tensor, high: Tensor, generator: Generator) -> Tensor:
    """n corners (n, 2) from a generator, uniform between `low` and `high`, both inclusive."""
    return low + (torch.rand(n, 2, generator=generator) * (high - low + 1)).long()


def _hashed(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same from the images' bytes: two random linear combinations modulo 2^64, their upper bits."""
    size = images[0].numel()
    weights = torch.randint(-(2**62), 2**62, (size, 2), generator=seeds.generator(0, "patch", "place"))
    weights, low, high = (tensor.to(images.device) for tensor in (weights, low, high))
    flat = images.reshape(len(images), size).long()
    sums = torch.stack([(flat * column).sum(1) for column in weights.unbind(1)], 1)
    return low + (sums >> 33) % (high - low + 1)


def stamp(images: Tensor, trigger: Trigger) -> Tensor:
    if not len(images):
        return images.clone()
    bounds = trigger["low"], trigger["high"]
    return torch.cat(
        [paste_at(part, trigger["patch"], _hashed(part, *bounds)) for part in images.split(BLOCK)]
    )
