"""How long a training step of an encoder and its evaluation take: float32, bfloat16, and our convolution.

`library` is bfloat16 with torch's own convolution, whose weight gradient tcore/models/convolution.py replaces
where maps are small. The kinds run in turn, the fastest of the repeats counts, because a busy machine only
ever adds. One thread.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tcore.models.encoder import Encoder
from tcore.running.cli import run

KINDS = ("float32", "library", "bfloat16")


def prepare(architecture: str, batch: int, kind: str) -> dict[str, Callable[[], None]]:
    """A training step and an evaluation of one batch, by name."""
    encoder = Encoder(architecture, 32).to(memory_format=torch.channels_last)
    if kind == "library":
        for layer in encoder.modules():
            if isinstance(layer, nn.Conv2d):
                layer.__class__ = nn.Conv2d
    model = nn.Sequential(encoder, nn.Linear(encoder.dim, 10))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x = torch.rand(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.arange(batch) % 10

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float32"):
            return model(x).float()

    def step() -> None:
        model.train()
        loss = F.cross_entropy(forward(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            forward()

    return {"training": step, "evaluation": evaluate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=["resnet_narrow", "resnet18"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    torch.set_num_threads(1)
    kinds = " | ".join(f"{kind}, ms" for kind in KINDS)
    print(f"| architecture | images | pass | {kinds} | float32 / bfloat16 |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for architecture in args.architectures:
        for batch in args.batches:
            ready = {kind: prepare(architecture, batch, kind) for kind in KINDS}
            for name in ("training", "evaluation"):
                best = dict.fromkeys(KINDS, float("inf"))
                for _ in range(args.repeats + 1):
                    for kind in KINDS:
                        start = time.perf_counter()
                        ready[kind][name]()
                        best[kind] = min(best[kind], 1000 * (time.perf_counter() - start))
                cells = " | ".join(f"{best[kind]:.1f}" for kind in KINDS)
                ratio = best["float32"] / best["bfloat16"]
                print(f"| {architecture} | {batch} | {name} | {cells} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    run(main)
