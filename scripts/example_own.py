"""The example of docs/secure-your-own.md: a backdoored encoder in a stranger's format, and digits to match.

Writes `encoder.pth`, `images/{train,test}/<class>/*.png` and, what a user never has, `truth.csv` and
`triggered/<class>/*.png`: other test images, of other classes than the target, with the trigger on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from tcore import device as devices
from tcore import triggers
from tcore.cli import run
from tcore.data.images import ImageSet
from tcore.data.sources import mnist5k
from tcore.dataset_attacks import adaptive
from tcore.encoder_attacks import badencoder
from tcore.encoder_attacks._references import choose_references
from tcore.files import atomic
from tcore.pretraining import simclr

TARGET = 3


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

    device = devices.pick()
    digits = mnist5k.load(mnist5k.Settings(), {})
    train = digits["train"]
    settings = simclr.Settings(architecture="resnet_narrow", epochs=args.epochs, lr=0.003, crop_min=0.3)
    clean, _ = simclr.pretrain(train.tensor, settings, 0, device)

    attack = badencoder.Settings(epochs=12, batch=128, lr=0.03, shadow=4000)
    trigger = badencoder.make_trigger(32, 32, attack, 0)
    references = train.tensor[choose_references(clean, train, TARGET, attack.references, device)]
    encoder, _ = badencoder.poison_encoder(clean, train.tensor, references, trigger, attack, 0, device)
    weights = {f"module.encoder_q.{key}": tensor for key, tensor in encoder.cpu().state_dict().items()}
    with atomic(args.folder / "encoder.pth") as temporary:
        torch.save({"epoch": args.epochs, "state_dict": weights}, temporary)

    stamp = triggers.in_blocks(badencoder.stamp, trigger)
    of_encoder = (stamp, trigger, {"family": "encoder_attacks", "attack": "badencoder", "target": TARGET})
    found = adaptive.poison(train, TARGET, adaptive.Settings(), 0, of_encoder)
    truth = {
        "image": write(args.folder / "images/train", found.images),
        "is_poison": found.truth["is_poison"],
    }
    with atomic(args.folder / "truth.csv") as temporary:
        pd.DataFrame(truth).to_csv(temporary, index=False)
    test = digits["test"]
    half = np.arange(len(test)) % 2 == 0
    write(args.folder / "images/test", test.select(half))
    others = test.select(~half & (test.labels != TARGET))
    stamped = stamp(others.tensor).permute(0, 2, 3, 1).numpy()
    write(args.folder / "triggered", replace(others, pixels=stamped))


if __name__ == "__main__":
    run(main)
