"""SCALE-UP (Guo et al., ICLR 2023): predictions of triggered images survive brightening.

    SPC(x) = share of n in S with argmax f(clip(n x, 0, 1)) = argmax f(x),  S = 3, 5, 7, 9, 11
    score = SPC + 0.01 conf(x)          flag: SPC >= threshold

on pixels in [0, 1]; conf is the mean over S of the softmax of f's prediction for x. SPC alone has six
values, and a detector that has to name the cleanest 1 % needs more: conf, below one step of SPC,
orders ties. It needs f alone: no clean data, no rate. The variant that standardises SPC by clean
samples is left out: its released code compares standard scores with the same 0.5. Released `detect` also
stops after one batch.
Images that are black or bright to begin with do not change when scaled, nor do white patches,
for which its authors say that it does not work.

Cost: a forward pass of every sample through the whole network, and one more for each factor: six by default.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tcore.defenses._interface import Received
from tcore.device import autocast
from tcore.models.encoder import check_size, floats

KIND = "detector"
CLEAN = False
NEEDS_NORM = False
ORACLE = ()
INPUTS = True
TIE = 0.01  # weight of the confidence


@dataclass(frozen=True)
class Settings:
    factors: tuple[int, ...] = (3, 5, 7, 9, 11)  # S, by which pixels are multiplied, in [1, inf) [paper]
    threshold: float = 0.5  # flagged from this SPC on, in [0, 1] [code]
    batch: int = 512  # images per forward pass, in [1, inf)


@torch.no_grad()
def score_inputs(images: Tensor, received: Received, settings: Settings, seed: int) -> Tensor:
    """SPC, ties by confidence, (N,) of uint8 images."""
    model = received.model.eval()
    check_size(model.encoder, images)
    found = []
    for part in images.split(settings.batch):
        x = floats(part)
        with autocast(x.device):
            first = model(x).argmax(1)
            outs = [model((n * x).clamp(max=1)).float() for n in settings.factors]
        same = torch.stack([out.argmax(1) == first for out in outs]).float().mean(0)
        sure = torch.stack([o.softmax(1).gather(1, first[:, None])[:, 0] for o in outs]).mean(0)
        found.append(same + TIE * sure)
    return torch.cat(found)


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    return score_inputs(received.images, received, settings, seed)


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    steps = len(settings.factors)
    return ((score * steps + 1e-4).floor() / steps) >= settings.threshold - 1e-6
