"""How long each attack on a data set takes, and how much memory: 50,000 noise images by default.

Two columns: the whole step, which copies the set, and the overlay, which computes only the rows that
change (the median of the repeats). Memory is the largest growth of the process over one whole step, in
a process of its own; the input is not counted.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time

import numpy as np
import torch

from tcore.data.images import ImageSet
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.running.cli import run

ATTACKS = ("badnets", "blended", "sig", "wanet", "tact", "adap_blend", "adap_patch")


def noise(n: int, side: int) -> ImageSet:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (n, side, side, 3), np.uint8)
    return ImageSet(pixels, np.arange(n) % 10, np.arange(n), tuple("0123456789"), "noise")


def measure(name: str, overrides: dict, n: int, side: int, repeats: int) -> dict:
    """Seconds of a whole step and of its overlay, rows changed, MiB."""
    torch.set_num_threads(1)
    images = noise(n, side)
    attack = registry.load("dataset_attacks", name)
    settings = attack.Settings(**resolve(name, overrides, "--settings"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = attack.poison(images, 2, settings, 0)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    changed = np.flatnonzero(result.truth["is_poison"] | result.truth["is_cover"])
    whole, copy = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        attack.poison(images, 2, settings, 0)
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        images.pixels.copy()
        copy.append(time.perf_counter() - start)
    seconds = statistics.median(whole)
    overlay = statistics.median(a - b for a, b in zip(whole, copy, strict=True))
    return {"rows": len(changed), "overlay": overlay, "seconds": seconds, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", nargs="+", default=ATTACKS)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON object for all these attacks")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--side", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    print("| attack | rows changed | overlay, s | whole step, s | images/s | memory, MiB |")
    print("|---|---|---|---|---|---|")
    for name in args.attacks:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (name, args.settings, args.images, args.side, args.repeats))
        rate = args.images / found["seconds"]
        print(
            f"| {name} | {found['rows']:,} | {found['overlay']:.3f} | {found['seconds']:.3f} | "
            f"{rate:,.0f} | {found['memory']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
