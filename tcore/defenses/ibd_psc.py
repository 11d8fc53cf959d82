"""IBD-PSC (Hou et al., ICML 2024): confidence in triggered images survives amplified batch norm.

Number the K batch norms from the last to the first; f_j is f with scale and shift of the last j
multiplied by `omega`. k* is the first j for which f_j errs on more than `xi` of the clean samples.

    PSC(x) = mean over i = 1..n of softmax f_{k*+i}(x) [argmax f(x)]
    score = PSC          flag: PSC >= threshold

It needs batch norm in the encoder and labelled clean samples to find k*. The released code searches to
K - 1, returns nothing where no j gets there and then crashes; here k* is then K - n and a
warning says so, and k* + i stays at most K. Copies are made once, not for every batch.

Cost: 1 + n forward passes of every sample, and up to K - 1 of every clean one, through the whole network.
"""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcore.defenses._interface import NotApplicable, Received
from tcore.models.classifier import Classifier, logits

KIND = "detector"
CLEAN = True
NEEDS_NORM = True
ORACLE = ()
INPUTS = True


@dataclass(frozen=True)
class Settings:
    omega: float = 1.5  # factor of scale and shift, in [0, inf) [paper]
    models: int = 5  # n, amplified copies that vote, in [1, inf) [paper]
    xi: float = 0.6  # error on clean samples at which amplifying starts, in [0, 1] [paper]
    threshold: float = 0.9  # flagged from this PSC on, in [0, 1] [paper]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Batch norms from the last to the first."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][::-1]


def amplified(model: Classifier, count: int, omega: float) -> Classifier:
    """A copy with the last `count` batch norms multiplied."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for norm in norms(model.encoder)[:count]:
            norm.weight *= omega
            norm.bias *= omega
    return model


def first_amplified(model: Classifier, images: Tensor, labels: Tensor, settings: Settings) -> int:
    """k*, from clean images and their labels."""
    total = len(norms(model.encoder))
    for count in range(1, total):
        wrong = logits(amplified(model, count, settings.omega), images).argmax(1) != labels
        if wrong.float().mean() > settings.xi:
            return count
    warnings.warn(
        f"ibd_psc: no amplification brings the clean error above xi = {settings.xi}; "
        f"starting at {max(1, total - settings.models)} of {total} batch norms",
        stacklevel=2,
    )
    return max(1, total - settings.models)


def score_inputs(images: Tensor, received: Received, settings: Settings, seed: int) -> Tensor:
    """PSC (N,) of uint8 images."""
    model, clean = received.model, received.clean
    if settings.models < 1:
        raise NotApplicable("it has no amplified model to ask: ibd_psc.models is below 1")
    start = first_amplified(model, received.images[clean], received.labels[clean], settings)
    last = len(norms(model.encoder))
    counts = [min(start + i, last) for i in range(1, settings.models + 1)]
    first = logits(model, images).argmax(1, keepdim=True)
    sure = [
        logits(amplified(model, count, settings.omega), images).softmax(1).gather(1, first)[:, 0]
        for count in counts
    ]
    return torch.stack(sure).mean(0)


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    return score_inputs(received.images, received, settings, seed)


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    return score >= settings.threshold
