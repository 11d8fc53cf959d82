"""What several sources share: decoding, resizing and holding out a test split."""

import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tcore import seeds
from tcore.files import InputError
from tcore.running import memory


def at_least(least: int, value: int, where: str) -> int:
    """`value`, or an InputError that names it by `where`."""
    if value < least:
        raise InputError(f"{where} = {value} should be at least {least}")
    return value


def decode(content: bytes | Path, where: str) -> Image.Image:
    """An RGB image from a file or its bytes, in any format that Pillow reads; `where` names it in errors."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.mode.startswith("I;16"):  # Pillow would cut it off at 255
                return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
            return ImageOps.exif_transpose(image).convert("RGB")  # photographs may be stored lying down
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: not a readable image ({error}); mend or remove it") from error


def square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` pixels (bilinear, antialiased), longer side cropped around the centre."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def stack(images: Iterable[Image.Image], count: int, where: str) -> np.ndarray:
    """(count, H, W, 3) uint8 of `count` > 0 RGB images, which must agree in size and fit into memory."""
    pixels = None
    for row, image in enumerate(images):
        if pixels is None:
            shape = (count, image.height, image.width, 3)
            what = f"{where}: {count:,} images of {image.width}x{image.height} pixels"
            remedy = "take fewer images, a smaller image_size, or a machine with more"
            memory.require(math.prod(shape), memory.free(), what, remedy)
            pixels = np.empty(shape, np.uint8)
        if (image.height, image.width) != pixels.shape[1:3]:
            raise InputError(
                f"{where}: image {row} of {count} is {image.height}x{image.width}, the first one is "
                f"{pixels.shape[1]}x{pixels.shape[2]}; set image_size to bring all to one size"
            )
        pixels[row] = image
    return pixels


def hold_out(labels: np.ndarray, share: float, seed: int, where: str) -> np.ndarray:
    """A mask (N,) that is true for a random `share` of every class, rounded to whole images."""
    rng = np.random.default_rng(seeds.derive(seed, "hold_out"))
    mask = np.zeros(len(labels), bool)
    if 0 < share < 1:
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            mask[rows[: round(share * len(rows))]] = True
    if not mask.any() or mask.all():
        raise InputError(
            f"{where}: test_share = {share} leaves no training or no test image; "
            "choose a share between 0 and 1 that fits the size of the classes"
        )
    return mask
