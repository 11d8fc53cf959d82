"""CorruptEncoder: added images show an object of the target class beside the trigger.

Zhang, Liu, Wang, Jia, Gong: Data Poisoning based Backdoor Attacks to Contrastive Learning, CVPR 2024. Two
random crops of such a composite often show the object alone and the trigger alone, and pre-training pulls
both together; the target class need not occur in pre-training. On a canvas of height H and width W:

* a background, here a random image of the pre-training set (paper: other photographs);
* the object of a random reference, H x W/2, at the left or right, at most 5 % of the width from the edge,
  blended with its mask, which is blurred over one pixel;
* the patch of `_patch.py` in the other half, within its middle W/4 columns and H/2 rows, opaque.

CorruptEncoder+ makes a share of the composites from a reference beside another image of the target class,
without a trigger. References are images of the target class of the downstream set, drawn at random, or
those of a file. Where the file has masks, an object is the bounding box of its mask, stretched to H x W/2:
the paper's canvas is twice as wide as its object, this one is that canvas at the size of the other images.
Without masks an object is the middle half of a reference's columns; at 32 pixels objects fill the image,
and the half needs no stretching.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.encoder_attacks import _patch
from tcore.encoder_attacks._patch import stamp
from tcore.encoder_attacks._references import read_references
from tcore.encoder_attacks._unlabelled import append
from tcore.files import InputError
from tcore.poisoning import Poisoned, check_target, choose
from tcore.triggers import Trigger

__all__ = ["Settings", "composites", "cut", "make_trigger", "poison_images", "stamp"]


@dataclass(frozen=True)
class Settings:
    references: int = 3  # reference images of the target class [CorruptEncoder]
    reference_file: str | None = None  # .npz with `x` (R, H, W, 3), `mask` (R, H, W); null: drawn [ours]
    rate: float = 0.005  # added images as a share of the pre-training set [CorruptEncoder]
    support: float = 0.0  # share of them without trigger; CorruptEncoder+: 0.2 [CorruptEncoder]
    support_images: int = 5  # images of the target class beside the reference there [CorruptEncoder]
    size: int | None = None  # side of the patch; null: 40 at 224 px, in proportion [CorruptEncoder]
    place_test: tuple[float, float] = (0.25, 0.75)  # at test, as shares of each side [CorruptEncoder]
    pattern_seed: int = 10  # which patch is drawn [ours]


def make_trigger(height: int, width: int, settings: Settings, seed: int) -> Trigger:
    side = round(min(height, width) * 40 / 224) if settings.size is None else settings.size
    return _patch.make_trigger(
        "corruptencoder", height, width, side, settings.pattern_seed, settings.place_test
    )


def cut(references: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Objects (R, 3, H, W/2) float32 in 0..255 and how opaque they are (R, 1, H, W/2), in 0..1."""
    height, width = references.shape[2:]
    half = width // 2
    if masks is None:
        left = (width - half) // 2
        objects = references[..., left : left + half].float()
        return objects, torch.ones_like(objects[:, :1])
    objects, opacity = [], []
    for reference, mask in zip(references, masks, strict=True):
        (top, bottom), (left, right) = (
            (line.nonzero().min(), line.nonzero().max() + 1) for line in (mask.any(1), mask.any(0))
        )
        box = torch.cat([reference.float(), mask[None].float()])[None, :, top:bottom, left:right]
        stretched = F.interpolate(box, (height, half), mode="bilinear", antialias=True, align_corners=False)
        objects.append(stretched[0, :3])
        opacity.append(stretched[0, 3:])
    kernel = torch.exp(-torch.arange(-3, 4).square() / 2.0)  # standard deviation 1
    blurred = torch.stack(opacity)
    for shape in ((1, 1, 7, 1), (1, 1, 1, 7)):
        pad = (shape[3] // 2,) * 2 + (shape[2] // 2,) * 2
        blurred = F.conv2d(F.pad(blurred, pad, "replicate"), (kernel / kernel.sum()).view(shape))
    return torch.stack(objects), blurred


def composites(
    backgrounds: Tensor, objects: Tensor, opacity: Tensor, right: Tensor, offset: Tensor
) -> Tensor:
    """Backgrounds (n, 3, H, W) uint8 with an object (n, 3, H, W/2) each, `offset` (n,) pixels from an edge.

    The edge is the right one where `right` (n,) bool is true.
    """
    width, half = backgrounds.shape[3], objects.shape[3]
    start = torch.where(right, width - half - offset, offset)
    column = torch.arange(width) - start.view(-1, 1)  # of the object, (n, W)
    inside = (column >= 0) & (column < half)
    column = column.clamp(0, half - 1)[:, None, None, :]
    shape = (-1, -1, backgrounds.shape[2], -1)
    objects = objects.gather(3, column.expand(len(objects), 3, *shape[2:]))
    opacity = opacity.gather(3, column.expand(len(objects), 1, *shape[2:])) * inside[:, None, None, :]
    mixed = backgrounds + opacity * (objects - backgrounds)
    return (mixed + 0.5).floor().clamp(0, 255).to(torch.uint8)


def poison_images(
    images: ImageSet, downstream: ImageSet, target: int, trigger: Trigger, settings: Settings, seed: int
) -> Poisoned:
    height, width = images.pixels.shape[1:3]
    name = ("encoder_attacks", "corruptencoder")
    own = downstream.labels == check_target(downstream, target)
    if settings.reference_file:
        references, masks = read_references(settings.reference_file, height, width)
    else:
        rows = choose(own, settings.references, seed, *name, "references")
        references, masks = downstream.tensor[rows], None
    objects, opacity = cut(references, masks)
    n = int(settings.rate * len(images))
    plain = int(settings.support * n)  # the first of them have a support image and no trigger
    random = seeds.generator(seed, *name, "composites")

    def draw(below: int) -> Tensor:
        return torch.randint(below, (n,), generator=random)

    which, right = draw(len(objects)), draw(2).bool()
    offset = draw(int(0.05 * width) + 1)
    backgrounds = images.tensor[draw(len(images))]
    if plain:
        rows = choose(own, settings.support_images, seed, *name, "support")
        support, whole = cut(downstream.tensor[rows[draw(len(rows))[:plain]]], None)
        offset[:plain] = 0
        backgrounds[:plain] = composites(backgrounds[:plain], support, whole, ~right[:plain], offset[:plain])
    poisons = composites(backgrounds, objects[which], opacity[which], right, offset)

    side = trigger["patch"].shape[-1]
    low = torch.tensor([round(0.25 * height), round(0.125 * width)])
    high = torch.tensor([round(0.75 * height), round(0.375 * width)]) - side
    if (high < low).any():
        raise InputError(
            f"corruptencoder: a patch of {side} pixels does not fit into a quarter of {width} columns; "
            "lower size"
        )
    corners = _patch.draw_corners(n, low, high, random)
    corners[:, 1] += torch.where(right, 0, width // 2)
    poisons[plain:] = _patch.paste_at(poisons[plain:], trigger["patch"], corners[plain:])
    return Poisoned(*append(images, poisons), trigger, target, name)
