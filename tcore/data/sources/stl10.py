"""STL-10 (Coates, Lee, Ng 2011): 5,000 training, 8,000 test and 100,000 unlabelled images, 96x96.

Read from the binary version: three colour planes an image, each stored column by column,
labels 1 to 10. With `unlabeled: true` the training split is the 100,000 unlabelled images, for
pre-training. Images are resized with Pillow (bilinear, antialiased) to `image_size`.
The checksum is torchvision's. Reading the unlabelled part takes some 3 GB of memory, twice that at 96 pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tcore.data.archives import Archive, read_tar
from tcore.data.images import ImageSet
from tcore.data.sources._reading import at_least, square, stack
from tcore.files import InputError

NAME = "stl10_binary.tar.gz"
ARCHIVES = (
    Archive(NAME, f"http://ai.stanford.edu/~acoates/stl10/{NAME}", "md5:91f7769df0f17e558f3565bffb0c7dfb"),
)
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SIDE = 96


@dataclass(frozen=True)
class Settings:
    image_size: int = 32  # height and width in pixels, in [1, inf); 96 keeps the images as they are
    unlabeled: bool = False  # true: train on the unlabelled part, labels -1


def load(settings: Settings, archives: dict[str, Path]) -> dict[str, ImageSet]:
    """The splits 'train' and 'test'."""
    path, size = archives[NAME], at_least(1, settings.image_size, "stl10: image_size")
    parts = {"train": "unlabeled" if settings.unlabeled else "train", "test": "test"}
    files = [f"stl10_binary/{part}_X.bin" for part in parts.values()]
    files += [f"stl10_binary/{part}_y.bin" for part in parts.values() if part != "unlabeled"]
    content = read_tar(path, tuple(files))

    def split(name: str) -> ImageSet:
        planes = np.frombuffer(content.pop(f"stl10_binary/{name}_X.bin"), np.uint8)
        if not planes.size or planes.size % (3 * SIDE * SIDE):
            raise InputError(f"{path}: {name}_X.bin does not hold whole images of {SIDE}x{SIDE}")
        pixels = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)
        if size != SIDE:
            resized = (square(Image.fromarray(np.ascontiguousarray(x)), size) for x in pixels)
            pixels = stack(resized, len(pixels), str(path))
        if name == "unlabeled":
            labels = np.full(len(pixels), -1)
        else:
            labels = np.frombuffer(content[f"stl10_binary/{name}_y.bin"], np.uint8).astype(np.int64) - 1
        return ImageSet(
            pixels=np.ascontiguousarray(pixels),
            labels=labels,
            index=np.arange(len(pixels)),
            class_names=CLASSES,
            origin=f"STL-10, {name}",
        )

    return {name: split(part) for name, part in parts.items()}
