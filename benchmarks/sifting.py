"""How long sifting takes, and how much memory: Gaussian mixtures in six layers, ten classes.

The first class has 22 % of the samples, some more than the largest of SVHN. A cluster of 70 % and three
small ones make up a class. Samples lie about their cluster's centre in `--latent` dimensions, which each
layer maps to `--features` and adds noise to. Every n has a process of its own. Memory is this process's
peak, and what it had held before sifting: libraries and layers.
"""

import argparse
import multiprocessing
import resource
import time

import torch
from torch import Tensor

from tcore.running.cli import run
from tcore.stages import sift

LAYERS, CLASSES, LARGEST = 6, 10, 0.22
CLUSTERS = (0.7, 0.1, 0.1, 0.1)  # shares of a class


def mixtures(n: int, features: int, latent: int) -> tuple[list[Tensor], Tensor]:
    """Layers (n, features) and labels (n,)."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    labels = torch.randint(1, CLASSES, (n,), generator=random)
    labels[torch.randperm(n, generator=random)[: int(LARGEST * n)]] = 0
    cluster = torch.multinomial(torch.tensor(CLUSTERS), n, replacement=True, generator=random)
    place = 2 * normal(CLASSES, len(CLUSTERS), latent)[labels, cluster] + normal(n, latent)
    layers = []
    for _ in range(LAYERS):
        layers.append(place @ normal(latent, features) / latent**0.5)
        for part in layers[-1].split(4096):
            part += 0.1 * normal(*part.shape)
    return layers, labels


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(n: int, features: int, latent: int, threads: int) -> tuple[float, float, float, float]:
    """Seconds, CPU seconds, MiB at the peak, MiB before."""
    torch.set_num_threads(threads)
    layers, labels = mixtures(n, features, latent)
    before, start, used = peak(), time.perf_counter(), time.process_time()
    sift.sift(layers, labels, sift.Settings())
    return time.perf_counter() - start, time.process_time() - used, peak(), before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[2500, 5000, 10_000, 20_000])
    parser.add_argument("--features", type=int, default=512, help="width of each layer")
    parser.add_argument("--latent", type=int, default=32, help="dimensions that the clusters have")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    print("| samples | seconds | CPU seconds | peak, MiB | before, MiB |")
    print("|---|---|---|---|---|")
    for n in args.samples:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (n, args.features, args.latent, args.threads))
        print(f"| {n:,} | " + " | ".join(f"{number:,.1f}" for number in found) + " |", flush=True)


if __name__ == "__main__":
    run(main)
