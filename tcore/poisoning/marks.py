"""Marks that attacks put on images: drawn here, or a picture of the user's.

A mark is (colours (3, H, W) uint8, mask (1, H, W) bool). The drawn ones stand at the places and have the
sizes of backdoor-toolbox's trigger pictures, which are third parties' art and not shipped. Each is a
function of a pixel's place in 32nds of the image, so it looks the same at every size. An attack's success
depends on the picture, so results with these and with the customary pictures do not compare to the digit.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tcore import seeds
from tcore.files import InputError, require

Mark = tuple[Tensor, Tensor]


def colour_field(height: int, width: int, seed: int) -> Tensor:
    """(3, H, W) uint8: smooth noise on three scales, every grey level equally often per channel.

    The same picture at every size. Uniform levels in 6..249 have standard deviation 70, about that of
    the customary cartoon picture, which decides how well a blended trigger works.
    """
    generator = seeds.generator(seed, "blended", "pattern")
    field = sum(
        F.interpolate(torch.randn(1, 3, n, n, generator=generator), (height, width), mode="bicubic")[0] / n
        for n in (4, 8, 16)
    )
    rank = field.flatten(1).argsort(1).argsort(1).view(3, height, width)
    return (6 + rank * 243 // max(height * width - 1, 1)).to(torch.uint8)


def picture(path: str | None, pattern_seed: int, height: int, width: int) -> Tensor:
    """(3, H, W) uint8: the image file, stretched smoothly to the size, or the colour field without one."""
    if path is None:
        return colour_field(height, width, pattern_seed)
    return _read(path, "RGB", height, width, Image.Resampling.BILINEAR)


def mark(name: str, height: int, width: int) -> Mark:
    """A drawn mark, or else the picture at the path `name`, stretched to the image by repeating pixels.

    What is opaque in the picture is the mark; without transparency, what is not black.
    """
    if name in DRAWN:
        y = ((torch.arange(height, dtype=torch.float64) + 0.5) * 32 / height).view(-1, 1)
        x = ((torch.arange(width, dtype=torch.float64) + 0.5) * 32 / width).view(1, -1)
        colours, mask = DRAWN[name](y, x)
        mask = mask.expand(height, width)[None]
        colours = torch.stack([channel.expand(height, width) for channel in colours])
        return ((colours + 0.5).floor() * mask).to(torch.uint8), mask.clone()
    pixels = _read(name, "RGBA", height, width, Image.Resampling.NEAREST)
    opaque = pixels[3:] >= 128
    if opaque.all():
        opaque = (pixels[:3] > 0).any(0, keepdim=True)
    return pixels[:3] * opaque, opaque


def _read(path: str, mode: str, height: int, width: int, resampling: Image.Resampling) -> Tensor:
    source = f"you; it is the path of a picture, unless you meant one of {', '.join(DRAWN)}"
    try:
        with Image.open(require(path, source)) as file:
            pixels = np.array(file.convert(mode).resize((width, height), resampling))
    except OSError as error:
        raise InputError(f"{path}: not a readable picture ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _shade(first: tuple[int, int, int], last: tuple[int, int, int], t: Tensor) -> list[Tensor]:
    """Channels of the colours from `first` (t = 0) to `last` (t = 1)."""
    return [a + (b - a) * t for a, b in zip(first, last, strict=True)]


def _block(y: Tensor, x: Tensor):
    """A light blue corner block, 5x5 at 32 px, bottom right."""
    return _shade((225, 238, 255), (135, 170, 233), (y + x - 54) / 10), (y >= 27) & (x >= 27)


def _blocks(y: Tensor, x: Tensor):
    """The same block in both bottom corners."""
    return _block(y, torch.where(x < 5, x + 27, x))


def _disc(y: Tensor, x: Tensor):
    """An orange disc with a blue core, 13 pixels across at 32 px, top right."""
    radius = ((y - 7.5) ** 2 + (x - 24.5) ** 2).sqrt()
    return _shade((62, 70, 150), (242, 138, 52), (radius / 6.5).clamp(max=1)), radius <= 6.5


def _checkers(y: Tensor, x: Tensor):
    """A 3x3 checker in each corner at 32 px, the one of BadNets bottom right, the others mirrored."""
    row, column = (torch.minimum(place, 32 - place).floor() for place in (y, x))  # 0 at the edge
    white = (row == column) & (row < 2) | (row == 2) & (column == 0) | (row == 0) & (column == 2)
    return [255.0 * white] * 3, (row < 3) & (column < 3)


def _square(y: Tensor, x: Tensor):
    """64 colours, a pixel each, in rows and columns 21 to 28 at 32 px: four steps of red down, of green
    across, of blue within each 2x2 tile."""
    row, column = (y - 21).floor(), (x - 21).floor()
    blue = 2 * (row % 2) + column % 2
    colours = [85 * (row // 2) + 0 * column, 85 * (column // 2) + 0 * row, 85 * blue]
    inside = (row >= 0) & (row < 8) & (column >= 0) & (column < 8)
    return colours, inside


DRAWN = {"block": _block, "blocks": _blocks, "disc": _disc, "checkers": _checkers, "square": _square}
