"""How the cost of T-Core's stages grows with the data: seconds, memory and operations at n, 2n, 4n, 8n.

Images are noise about a colour for each class, the encoder is an untrained narrow ResNet, and settings are
the defaults with fewer passes and rounds, because only growth is asked for. Every measurement has a process
of its own. Memory is that process's peak above what it held before the stage (Linux). Operations are those of
products and convolutions, as torch counts them. The last row of a stage is the exponent k of n^k, from the
first to the last n.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tcore.models import head as heads
from tcore.models.channels import layers
from tcore.models.classifier import Classifier, logits
from tcore.models.encoder import Encoder, extract_features
from tcore.running.cli import run
from tcore.stages import bootstrap, expand, filter_channels, sift

CLASSES = 10
HEAD = heads.Settings(epochs=4)


def world(n: int, side: int = 32) -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """A classifier, uint8 images (n, 3, side, side), labels (n,) and every fifth sample, (n,) bool."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    colours = torch.randint(64, 192, (CLASSES, 3, 1, 1), generator=random)
    noise = torch.randint(-48, 48, (n, 3, side, side), generator=random)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder("resnet_narrow", side).eval()
    model = Classifier(encoder, heads.new_head(encoder.dim, CLASSES, HEAD, 0, "head"))
    return model, (colours[labels] + noise).to(torch.uint8), labels, torch.arange(n) // CLASSES % 5 == 0


def prepare(stage: str, n: int, side: int = 32) -> Callable[[], object]:
    """A stage on n samples, ready to run."""
    model, images, labels, fifth = world(n, side)
    encoder, everyone = model.encoder, torch.ones(n, dtype=torch.bool)
    untrusted = {name: torch.arange(len(m.weight)) % 10 == 0 for name, m in layers(encoder).items()}
    features = extract_features(encoder, images)
    if stage == "extract_features":
        return lambda: extract_features(encoder, images)
    if stage == "train_head":
        return lambda: heads.fit_head(model.head, features, labels, HEAD.epochs, 0, "head", bar=False)
    if stage == "sift":
        settings = sift.Settings(seed_share=0.1, depths=())
        return lambda: sift.sift(sift.activations(model, features, images, settings), labels, settings)
    if stage == "expand":
        few = expand.Settings(subset_share=0.25, steps=0)
        return lambda: expand.expand(features, labels, fifth, everyone, CLASSES, few, HEAD, 0)
    if stage == "filter_channels":
        brief = filter_channels.Settings(unlearn_epochs=1, epochs=3)
        return lambda: filter_channels.filter_channels(model, images, labels, fifth, brief, 0)
    if stage == "bootstrap":
        short = bootstrap.Settings(1, 1, gamma3=0.5, epochs=1, epochs_final=1)
        subset = (images, labels, CLASSES, fifth, everyone)
        return lambda: bootstrap.bootstrap(encoder, *subset, untrusted, short, HEAD, 0)
    return lambda: logits(model, images)


STAGES = ("extract_features", "train_head", "sift", "expand", "filter_channels", "bootstrap", "predict")


def operations(stage: str, n: int, side: int = 32) -> int:
    """Of products and convolutions."""
    ready = prepare(stage, n, side)
    with FlopCounterMode(display=False) as counter:
        ready()
    return counter.get_total_flops()


def measure(stage: str, n: int) -> tuple[float, float]:
    """Seconds and MiB."""
    torch.set_num_threads(1)
    prepare("train_head", 2 * CLASSES)()  # what torch loads at its first step
    ready = prepare(stage, n)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = kib("VmRSS"), time.perf_counter()
    ready()
    return time.perf_counter() - start, (kib("VmHWM") - before) / 1024


def kib(field: str) -> int:
    """Of this process's memory, as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[2000, 4000, 8000, 16_000])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    args = parser.parse_args()

    print("| stage | samples | seconds | MiB | operations, 10^9 |\n| --- | ---: | ---: | ---: | ---: |")
    for stage in args.stages:
        found = []
        for n in args.samples:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append((*pool.apply(measure, (stage, n)), pool.apply(operations, (stage, n)) / 1e9))
            seconds, memory, billions = found[-1]
            print(f"| {stage} | {n} | {seconds:.2f} | {memory:.0f} | {billions:.2f} |", flush=True)
        if len(found) > 1:
            doublings = math.log(args.samples[-1] / args.samples[0])
            first, last = ([max(value, 1e-9) for value in row] for row in (found[0], found[-1]))
            ks = [math.log(b / a) / doublings for a, b in zip(first, last, strict=True)]
            print(f"| {stage} | exponent | {ks[0]:.2f} | {ks[1]:.2f} | {ks[2]:.2f} |", flush=True)


if __name__ == "__main__":
    run(main)
