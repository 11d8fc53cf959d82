"""What the defences that train or repair a model share: its parts, passes over samples, random streams."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcore import seeds
from tcore.defenses._interface import Received, Whole
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.classifier import Classifier

SCOPES = ("encoder", "head", "both")


def copied(received: Received, scope: str, where: str) -> tuple[Classifier, list[nn.Parameter]]:
    """A copy of the suspect in eval mode, and its parameters in `scope`, the only ones to train."""
    if scope not in SCOPES:
        raise InputError(f"{where}.scope = {scope!r} should be one of {SCOPES}")
    model = copy.deepcopy(received.model).eval().requires_grad_(False)
    part = model if scope == "both" else getattr(model, scope)
    return model, list(part.requires_grad_(True).parameters())


def assembled(received: Received, network: nn.Module) -> Classifier:
    """The classifier of a network made by `received.network`."""
    if isinstance(network, Whole):
        return network.model
    return Classifier(copy.deepcopy(received.model.encoder), network)


def moved(images: Tensor, shift: float, flip: bool, generator: torch.Generator) -> Tensor:
    """uint8 images, each moved by up to `shift` of its side (black comes in) and mirrored by chance."""
    n, _, height, width = images.shape
    far = round(shift * height)
    top, left = torch.randint(0, 2 * far + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5 * flip
    rows = top + torch.arange(height)
    columns = left + torch.where(mirror, torch.arange(width).flip(0), torch.arange(width))
    image = torch.arange(n).view(n, 1, 1)
    padded = F.pad(images, [far] * 4).permute(0, 2, 3, 1)
    image, rows, columns = (t.to(images.device) for t in (image, rows[:, :, None], columns[:, None]))
    return padded[image, rows, columns].permute(0, 3, 1, 2)


def passes(
    inputs: Tensor, labels: Tensor, settings, epochs: int, generator: torch.Generator
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Shuffled batches (progress in [0, 1), inputs, labels) of `epochs` passes.

    Images are moved by the settings' `shift` and `flip`, features are not touched. `settings.batch` rows
    a batch.
    """
    total, done = epochs * math.ceil(len(labels) / settings.batch), 0
    for _ in range(epochs):
        for rows in heads.batches(len(labels), settings.batch, generator, labels.device):
            x = inputs[rows]
            if x.dtype == torch.uint8:
                x = moved(x, settings.shift, settings.flip, generator)
            yield done / total, x, labels[rows]
            done += 1


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float | None = None) -> None:
    """One step of the optimiser, at the rate `lr` if given."""
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


@contextmanager
def stream(device: torch.device, seed: int, *names: str) -> Iterator[None]:
    """Inside the block torch's global generators, which dropout uses, are the stream `names`."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, *names))
        yield
