"""What came from outside, looked at before anything that takes long: sizes, classes, repeated images, cost,
and whether T-Core's stages work on this network at all.

Only what a user has is looked at: the encoder and the labelled training images.
"""

import hashlib
import math
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from tcore.data.images import ImageSet
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.classifier import Classifier
from tcore.models.encoder import Encoder, check_size, floats
from tcore.running import memory
from tcore.stages import bootstrap, expand, filter_channels, sift

KEPT = 32 * 2**20  # bytes; glibc's largest threshold above which a freed block goes back to the system


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
    """The number of images of the smallest and the largest class, and of seed samples of the smallest.

    Raises InputError, naming the classes, where one has too few images for T-Core: each needs at least one
    seed sample, and DBSCAN one core point.
    """
    counts = np.bincount(images.labels, minlength=images.num_classes)
    if not 0 < settings.seed_share < 1:
        raise InputError(f"sift.seed_share = {settings.seed_share} should be between 0 and 1")
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
    n: int,
    sifting: sift.Settings,
    subset: expand.Settings,
    channels: filter_channels.Settings,
    pooling: bootstrap.Settings,
) -> tuple[int, int]:
    """How many images T-Core trains on and how many it only looks at; unlearning counted to its limit, the
    core as one layer's largest cluster."""
    chosen = int(min(subset.subset_share, sifting.majority if subset.within_core else 1.0) * n)
    trained = channels.unlearn_epochs * n + channels.epochs * chosen if channels.rank == "masks" else 0
    looked = 0
    pool = chosen
    rounds = [(pooling.gamma1, pooling.epochs)] * pooling.rounds_class
    rounds += [(pooling.gamma2, pooling.epochs)] * pooling.rounds_all
    while pool < pooling.rho * n:
        gamma, epochs = rounds.pop(0) if rounds else (pooling.gamma3, None)
        rest = n - pool
        copied = epochs is None and pooling.guidance == "meta"
        trained += (pooling.epochs_meta if epochs is None else epochs) * pool + copied * rest
        if pooling.within_core and epochs:
            rest = max(0, int(sifting.majority * n) - pool)
        looked += (1 + copied) * rest
        pool += min(rest, math.ceil(gamma * (n - pool if pooling.of_rest else n)))
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


def rehearse(
    encoder: Encoder, images: ImageSet, channels: filter_channels.Settings, pooling: bootstrap.Settings
) -> None:
    """Runs the two stages that train through the encoder on eight images, for a step or two.

    Raises InputError where they fail: networks from elsewhere can be anything.
    """
    device = encoder.mean.device
    rows = torch.arange(min(8, len(images)))
    pixels, labels = images.tensor[rows].to(device), images.targets[rows].to(device)
    head, every = heads.Settings(), torch.ones(len(rows), dtype=torch.bool, device=device)
    suspect = heads.new_head(encoder.dim, images.num_classes, head, 0, "rehearsal").to(device)
    channels = replace(channels, unlearn_epochs=1, epochs=1)
    pooling = replace(pooling, rounds_class=0, rounds_all=0, rho=0.0, epochs_final=1)
    try:
        untrusted = filter_channels.filter_channels(
            Classifier(encoder, suspect), pixels, labels, every, channels, 0
        )[1]
        bootstrap.bootstrap(
            encoder, pixels, labels, images.num_classes, every, every, untrusted, pooling, head, 0
        )
    except InputError:
        raise
    except Exception as error:  # the network's own code can raise anything
        raise InputError(
            f"{encoder.architecture}: T-Core's stages do not work on this network ({type(error).__name__}: "
            f"{error}); they need convolutions or linear layers, and normalisation with scale and shift"
        ) from error


def saved_blocks(encoder: Encoder, n: int) -> list[int]:
    """Bytes of each tensor that autograd keeps of a batch of n images, without what it keeps of none."""
    device, size = encoder.mean.device, encoder.image_size

    def kept(n: int) -> list[int]:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = encoder(floats(torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device)))
        del out
        return list(seen.values())

    return [n * max(0, more - less) for less, more in zip(kept(2), kept(3), strict=False)]


def memory_needed(encoder: Encoder, images: ImageSet, batch: int) -> int:
    """Bytes of the largest stage: the images, half as much for a selection, and the larger of two needs.

    These are a training step and sifting, with six layers and two copies as wide as the features, two blocks
    of distances and three lists of neighbours, by the defaults. A step takes what autograd keeps, half of
    that for gradients, gradients and Adam's two moments of the weights, and what the allocator does not give
    back: glibc keeps freed blocks below `KEPT`, as it was measured about four of the largest.
    """
    encoder.eval()
    blocks = saved_blocks(encoder, batch)
    weights = sum(weight.nbytes for weight in encoder.parameters())
    step = 1.5 * sum(blocks) + 3 * weights + 4 * min(max(blocks, default=0), KEPT)
    settings = sift.Settings()
    sifting = 4 * len(images.labels) * (8 * encoder.dim + 2 * settings.block + 3 * 2 * settings.neighbours)
    return int(1.5 * images.pixels.nbytes + max(step, sifting))


def check_memory(encoder: Encoder, images: ImageSet, batch: int) -> int:
    """`memory_needed`, or an InputError where it is more than there is on the encoder's device."""
    needed, device = memory_needed(encoder, images, batch), encoder.mean.device
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    elif (available := memory.free()) is not None:
        available += images.pixels.nbytes  # which this process holds already
    memory.require(
        needed,
        available,
        f"{images.origin}: T-Core on {len(images):,} images of {encoder.image_size} pixels, {batch} a step,",
        "lower bootstrap.batch and filter_channels.batch, take fewer images a class, an encoder for smaller "
        "images, or a machine with more",
    )
    return needed


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
    shares = {
        "expand.subset_share": subset.subset_share,
        "filter_channels.untrusted_share": channels.untrusted_share,
        "bootstrap.rho": pooling.rho,
    }
    for name, share in shares.items():
        if not 0 < share < 1:
            raise InputError(f"{name} = {share} should be between 0 and 1")
    found = {"images": len(images), "classes": images.num_classes} | check_classes(images, sifting)
    needed = check_memory(encoder, images, max(pooling.batch, channels.batch))
    rehearse(encoder, images, channels, pooling)
    trained, looked = passes(len(images), sifting, subset, channels, pooling)
    train, look = speed(encoder, images, pooling.batch)
    found |= repeats(images)
    return found | {
        "seconds": round(trained * train + looked * look),
        "memory_mb": round(needed / 2**20),
    }
