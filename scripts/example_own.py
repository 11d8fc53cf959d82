"""The example of docs/secure-your-own.md: an encoder in a stranger's format, and poisoned digits.

Writes `encoder.pth`, `images/<class>/*.png` and, what a user never has, `truth.csv` and
`triggered/<class>/*.png`: test images of other classes than the target with the trigger on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from tcore import device as devices
from tcore import triggers
from tcore.cli import run
from tcore.data.images import ImageSet
from tcore.data.sources import mnist5k
from tcore.dataset_attacks import badnets
from tcore.files import atomic
from tcore.pretraining import simclr

TARGET = 8


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
    parser.add_argument("--epochs", type=int, default=15, help="of pre-training")
    args = parser.parse_args()

    digits = mnist5k.load(mnist5k.Settings(), {})
    settings = simclr.Settings(architecture="resnet_narrow", epochs=args.epochs, lr=0.003, crop_min=0.3)
    encoder, _ = simclr.pretrain(digits["train"].tensor, settings, 0, devices.pick())
    weights = {f"module.encoder_q.{key}": tensor for key, tensor in encoder.cpu().state_dict().items()}
    with atomic(args.folder / "encoder.pth") as temporary:
        torch.save({"epoch": args.epochs, "state_dict": weights}, temporary)

    found = badnets.poison(digits["train"], TARGET, badnets.Settings(size=12), 0)
    paths = write(args.folder / "images", found.images)
    truth = pd.DataFrame({"image": paths, "is_poison": found.truth["is_poison"]})
    with atomic(args.folder / "truth.csv") as temporary:
        truth.to_csv(temporary, index=False)
    others = digits["test"].select(digits["test"].labels != TARGET)
    triggered = triggers.in_blocks(badnets.stamp, found.trigger)(others.tensor)
    write(args.folder / "triggered", replace(others, pixels=triggered.permute(0, 2, 3, 1).numpy()))


if __name__ == "__main__":
    run(main)
