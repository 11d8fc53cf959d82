"""What came from outside, looked at before anything that takes long: sizes, classes, repeated images, cost.

Only what a user has is looked at: the encoder and the labelled training images.
"""

import hashlib
import math
import time

import numpy as np
import pandas as pd
import torch

from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.models.encoder import Encoder, check_size, floats
from tcore.stages import bootstrap, expand, filter_channels, sift


def digests(images: ImageSet) -> list[bytes]:
    """Equal for equal pixels."""
    return [
        hashlib.blake2b(pixels, digest_size=16).digest() for pixels in np.ascontiguousarray(images.pixels)
    ]


def repeats(images: ImageSet) -> dict[str, int]:
    """`duplicates`: images that occurred before; `contradictions`: different images with several labels."""
    table = pd.DataFrame({"digest": digests(images), "label": images.labels})
    return {
        "duplicates": int(table["digest"].duplicated().sum()),
        "contradictions": int((table.groupby("digest")["label"].nunique() > 1).sum()),
    }


def check_classes(images: ImageSet, settings: sift.Settings) -> dict[str, int]:
    """The number of images of the smallest and the largest class, and of seeds of the smallest.

    Raises InputError, naming the classes, where one has too few images for T-Core: each needs at least one
    seed, and DBSCAN one core point.
    """
    counts = np.bincount(images.labels, minlength=images.num_classes)
    least = max(math.ceil(1 / settings.seed_share - 1e-9), settings.min_samples)
    small = np.flatnonzero(counts < least)
    if len(small):
        named = ", ".join(f"{images.class_names[k]!r} has {counts[k]}" for k in small[:5])
        named += f" and so on, {len(small)} classes in all" if len(small) > 5 else ""
        smallest = counts[small].min()
        remedy = "add images or leave such classes out"
        if smallest >= settings.min_samples:
            enough = math.ceil(1e4 / smallest) / 1e4
            remedy += f", or set methods.sift.seed_share to {enough} and trust the result less"
        raise InputError(
            f"{images.origin}: sift.seed_share {settings.seed_share} and sift.min_samples "
            f"{settings.min_samples} need {least} training images of every class; {named}; {remedy}"
        )
    return {
        "smallest": int(counts.min()),
        "largest": int(counts.max()),
        "seeds_of_smallest": int(settings.seed_share * counts.min()),
    }


def passes(
    n: int, subset: expand.Settings, channels: filter_channels.Settings, pooling: bootstrap.Settings
) -> tuple[int, int]:
    """How many images T-Core trains on and how many it only looks at; unlearning counted to its limit."""
    chosen = int(subset.subset_share * n)
    trained = channels.unlearn_epochs * n + channels.epochs * chosen
    looked = 0
    pool = chosen
    rounds = [(pooling.gamma1, pooling.epochs)] * pooling.rounds_class
    rounds += [(pooling.gamma2, pooling.epochs)] * pooling.rounds_all
    while rounds or pool < pooling.rho * n:
        gamma, epochs = rounds.pop(0) if rounds else (pooling.gamma3, None)
        rest = n - pool
        trained += pooling.epochs_meta * pool + rest if epochs is None else epochs * pool
        looked += 2 * rest if epochs is None else rest
        pool += math.ceil(gamma * rest)
    return trained + pooling.epochs_final * pool, looked


def speed(encoder: Encoder, images: ImageSet, batch: int) -> tuple[float, float]:
    """Seconds for one image: (to train on it, to look at it), from one batch, the second of two."""
    device = encoder.mean.device
    part = floats(images.tensor[:batch].to(device))

    def timed(step) -> float:
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(part)

    encoder.eval()
    train = timed(lambda: encoder(part).square().mean().backward())
    with torch.no_grad():
        return train, timed(lambda: encoder(part))


def check(
    encoder: Encoder,
    images: ImageSet,
    sifting: sift.Settings,
    subset: expand.Settings,
    channels: filter_channels.Settings,
    pooling: bootstrap.Settings,
) -> dict:
    """Findings on an encoder and labelled training images, on the encoder's device.

    `seconds`, the estimate for T-Core, leaves the training of heads out, which happens on cached features.
    Raises InputError for what T-Core cannot do.
    """
    check_size(encoder, images.tensor)
    found = {"images": len(images), "classes": images.num_classes} | check_classes(images, sifting)
    trained, looked = passes(len(images), subset, channels, pooling)
    train, look = speed(encoder, images, pooling.batch)
    found |= repeats(images)
    return found | {
        "seconds": round(trained * train + looked * look),
        "megabytes": round(images.pixels.nbytes / 2**20),
    }
