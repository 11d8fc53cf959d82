"""CorruptEncoder: added images show an object of the target class beside the trigger.

Zhang, Liu, Wang, Jia, Gong: Data Poisoning based Backdoor Attacks to Contrastive Learning, CVPR 2024. Two
random crops of such a composite often show the object alone and the trigger alone, and pre-training pulls
both together; the target class need not occur in pre-training. A composite is a canvas with

* a background, here a random image of the pre-training set (paper: other photographs), enlarged to cover
  the canvas, cut at a random column and at its lower edge;
* the object of a random reference, at the left or right, at most 5 % of the width from the edge, blended
  with its mask, which is blurred over one pixel;
* the patch of `_patch.py` in the other half, 12.5 % of the width and 25 % of the height from its edges.

The canvas is as high as the object and twice as wide. It is written at the size of the other images, so
stretched, and its aspect beside it, by which the pre-trainer's crops have the shapes that they would have
in the canvas: square windows of the stretched canvas show object and trigger alone ten times more rarely.
The patch is as large, beside a canvas of the images' height, as it is at test.

CorruptEncoder+ makes a share of the composites from a reference beside another image of the target class,
without a trigger. References are images of the target class of the downstream set, drawn at random, or
those of a file. An object is the bounding box of its mask, where the file has masks; without masks it is the
whole reference, which at 32 pixels objects mostly fill.

In the small runs here it needs many composites (40 % of the images) and a patch larger than the default
(docs/lab/encoder-attacks.md).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tcore import seeds
from tcore.data.images import ImageSet
from tcore.encoder_attacks import _patch
from tcore.encoder_attacks._patch import stamp
from tcore.encoder_attacks._references import read_references
from tcore.encoder_attacks._unlabelled import append
from tcore.files import InputError
from tcore.poisoning.poisoned import Poisoned, check_target, choose
from tcore.poisoning.triggers import Trigger

__all__ = ["Settings", "make_trigger", "poison_images", "stamp"]


@dataclass(frozen=True)
class Settings:
    references: int = 3  # reference images of the target class, in [1, inf) [CorruptEncoder]
    reference_file: str | None = None  # .npz with `x` (R, H, W, 3), `mask` (R, H, W); null: drawn [ours]
    rate: float = 0.005  # added images as a share of the pre-training set, in [0, inf) [CorruptEncoder]
    support: float = 0.0  # share of them without trigger, in [0, 1]; CorruptEncoder+: 0.2 [CorruptEncoder]
    support_images: int = 5  # images of the target class beside the reference, in [1, inf) [CorruptEncoder]
    size: int | None = None  # patch's side, in [1, inf); null: 40 at 224 px, in proportion [CorruptEncoder]
    place_test: tuple[float, float] = (0.25, 0.75)  # at test, shares of each side, in [0, 1] [CorruptEncoder]
    pattern_seed: int = 10  # which patch is drawn, in [0, inf) [ours]


def make_trigger(height: int, width: int, settings: Settings, seed: int) -> Trigger:
    side = round(min(height, width) * 40 / 224) if settings.size is None else settings.size
    return _patch.make_trigger(
        "corruptencoder", height, width, side, settings.pattern_seed, settings.place_test
    )


def cut(references: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Objects (R, 3, H, W/2) in 0..255, opacity (R, 1, H, W/2) in 0..1, their canvases' aspects (R,)."""
    height, width = references.shape[2:]
    half = width // 2
    if masks is None:
        masks = torch.ones(len(references), height, width, dtype=torch.bool)
    objects, aspects = [], []
    for reference, mask in zip(references, masks, strict=True):
        (top, bottom), (left, right) = (
            (line.nonzero().min(), line.nonzero().max() + 1) for line in (mask.any(1), mask.any(0))
        )
        box = torch.cat([reference.float(), 255.0 * mask[None]])[None, :, top:bottom, left:right]
        objects.append(_resized(box, height, half))
        aspects.append(2 * (right - left) / (bottom - top))
    objects, opacity = torch.cat(objects).split([3, 1], 1)
    kernel = torch.exp(-torch.arange(-3, 4).square() / 2.0)  # standard deviation 1
    for shape in ((1, 1, 7, 1), (1, 1, 1, 7)):
        pad = (shape[3] // 2,) * 2 + (shape[2] // 2,) * 2
        opacity = F.conv2d(F.pad(opacity, pad, "replicate"), (kernel / kernel.sum()).view(shape))
    return objects, opacity / 255, torch.stack(aspects)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(
        images.float(), (height, width), mode="bilinear", antialias=True, align_corners=False
    )


def backdrops(images: Tensor, aspects: Tensor, place: Tensor) -> Tensor:
    """Canvases (n, 3, H, W) float32 filled with an image (n, 3, H, W) each, as large as covers the canvas.

    The image is cut at its lower edge and, where it is too wide, at `place` (n,) from 0 (left) to 1 (right).
    """
    width, height = aspects.clamp(max=1), (1 / aspects).clamp(max=1)  # of the part that is seen
    zero = torch.zeros_like(width)
    x, y = (2 * place - 1) * (1 - width), 1 - height
    theta = torch.stack([width, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def composites(
    backgrounds: Tensor, objects: Tensor, opacity: Tensor, right: Tensor, offset: Tensor
) -> Tensor:
    """Backgrounds (n, 3, H, W) with an object (n, 3, H, W/2) each, `offset` (n,) pixels from an edge.

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
    return backgrounds + opacity * (objects - backgrounds)


def with_patch(canvases: Tensor, patch: Tensor, aspect: float, right: Tensor, random: Generator) -> Tensor:
    """Canvases (n, 3, H, W) uint8 of one aspect with the patch in the half where the object is not."""
    size = torch.tensor(canvases.shape[2:])
    side = patch.shape[-1]
    columns = max(1, round(side / aspect))
    low = (size * torch.tensor([0.25, 0.125])).round().long()
    high = (size * torch.tensor([0.75, 0.375])).round().long() - torch.tensor([side, columns])
    if (high < low).any():
        raise InputError(
            f"corruptencoder: a patch of {side} pixels does not fit beside an object in images of "
            f"{size[1]}x{size[0]}; lower size"
        )
    corners = _patch.draw_corners(len(canvases), low, high, random)
    corners[:, 1] += torch.where(right, 0, size[1] // 2)
    narrow = _resized(patch[None], side, columns)[0].round().to(torch.uint8)
    return _patch.paste_at(canvases, narrow, corners)


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
    objects, opacity, aspects = cut(references, masks)
    n = int(settings.rate * len(images))
    plain = int(settings.support * n)  # the first of them have a support image and no trigger
    random = seeds.generator(seed, *name, "composites")

    def draw(below: int) -> Tensor:
        return torch.randint(below, (n,), generator=random)

    which, right = draw(len(objects)), draw(2).bool()
    offset = draw(int(0.05 * width) + 1)
    place = torch.rand(n, generator=random)
    canvases = backdrops(images.tensor[draw(len(images))], aspects[which], place)
    if plain:
        rows = choose(own, settings.support_images, seed, *name, "support")
        support, whole, _ = cut(downstream.tensor[rows[draw(len(rows))[:plain]]], None)
        offset[:plain] = 0
        canvases[:plain] = composites(canvases[:plain], support, whole, ~right[:plain], offset[:plain])
    canvases = composites(canvases, objects[which], opacity[which], right, offset)
    poisons = (canvases + 0.5).floor().clamp(0, 255).to(torch.uint8)
    triggered = torch.arange(n) >= plain
    for r, aspect in enumerate(aspects.tolist()):
        rows = (which == r) & triggered
        poisons[rows] = with_patch(poisons[rows], trigger["patch"], aspect, right[rows], random)
    return Poisoned(*append(images, poisons, aspects[which]), trigger, target, name)
