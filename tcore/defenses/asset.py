"""ASSET (Pan et al., USENIX Security 2023): push clean samples to flat outputs, suspects to high loss.

A scorer f starts anew and passes over D; for each batch B and a random batch Bc of clean samples

    descend  the mean over Bc of the variance of f's logits                     clean: loss near log C
    with a new MLP V, trained to tell penultimate activations of B (1) from those of Bc (0),
    P = members of B whose adjusted outlyingness of V is above `outlyingness`
    ascend   the mean CE of f on P (with its labels)                           suspects: high loss

    score = CE(f(x), y)       flag: score >= mu + sigma sqrt(-2 ln(1e-6 sigma sqrt(2 pi)))

mu, sigma of the scores at or below their median: where their Gaussian's density falls to 1e-6. The
released code has sigma sqrt(2 pi) outside of the logarithm, so that the cut depends on the
losses' unit; `released_cut` takes it literally. Adjusted outlyingness (Hubert and Vandervieren): distance
to the median over the distance of a whisker that the medcouple skews.

It needs clean samples (1,000 in the paper) and a suspect model for the activations; no rate. f is a
new head on cached features (`part` of what is received). One pass, as released for 50,000 images, is few
steps on fewer: `epochs` is a setting. Scores are taken in one pass in eval mode; the released
helper scores the poisons in training mode and the others in eval mode, and some of its
separation is that. |P| = 0 gives no step, where it gave NaN.

On networks trained end to end its score ranks as it should, but its threshold finds little
(docs/lab/detectors.md).

Cost: for every batch of D a training step on Bc, one on P and 200 of V; at the end one forward pass over D.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tcore import seeds
from tcore.defenses._interface import Received, in_blocks
from tcore.models.head import batches

KIND = "detector"
CLEAN = True
NEEDS_NORM = False
ORACLE = ()
TRAINS = True


@dataclass(frozen=True)
class Settings:
    epochs: int = 1  # passes over D, in [1, inf) [code]
    batch: int = 512  # samples of either kind a step, in [1, inf) [code]
    lr: float = 1e-4  # Adam's rate of f, both directions, in (0, inf) [code]
    inner_steps: int = 100  # steps of V, alternating between D and clean, in [1, inf) [code]
    inner_lr: float = 1e-4  # Adam's rate of V, in (0, inf) [code]
    hidden: int = 128  # width of V's two hidden layers, in [1, inf) [code]
    outlyingness: float = 2.0  # above it a sample is pushed to a high loss, in [0, inf) [code]
    layer: str = "penultimate"  # what V sees, one of encoder, hidden, penultimate [code: before the head]
    level: float = 1e-6  # density at which the threshold stands, in (0, inf) [code]
    released_cut: bool = False  # the threshold formula as released [open]


def medcouple(values: Tensor) -> Tensor:
    """The medcouple of values (n,): a robust skewness in [-1, 1]. Takes n^2 / 4 numbers of memory."""
    x = values.double().sort(descending=True).values
    median = x.quantile(0.5)
    x = x - median
    upper, lower = x[x >= 0], x[x <= 0]
    spread = upper[:, None] - lower[None, :]
    kernel = (upper[:, None] + lower[None, :]) / spread.clamp(min=1e-300)
    ties = int((x == 0).sum())
    if ties:  # pairs at the median count by their place
        i = torch.arange(ties, device=x.device)
        kernel[-ties:, :ties] = (ties - 1 - i[:, None] - i[None, :]).sign().double()
    return kernel.flatten().quantile(0.5) if kernel.numel() < 10**6 else kernel.flatten().median()


def adjusted_outlyingness(values: Tensor) -> Tensor:
    """AO (n,): distance from the median in units of the skew-adjusted whisker."""
    values = values.double()
    low, median, high = values.quantile(values.new_tensor([0.25, 0.5, 0.75]))
    skew, width = medcouple(values), high - low
    up, down = (3, -4) if skew > 0 else (4, -3)
    above = high + 1.5 * torch.exp(up * skew) * width - median
    below = median - low + 1.5 * torch.exp(down * skew) * width
    side = torch.where(values >= median, above, below)
    return (values - median).abs() / side.clamp(min=1e-30)


def outliers(batch: Tensor, clean: Tensor, settings: Settings, seed: int) -> Tensor:
    """P: members (B,) bool of a batch of activations (B, d) that V sets apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        v = nn.Sequential(
            nn.Linear(batch.shape[1], settings.hidden), nn.ReLU(),
            nn.Linear(settings.hidden, settings.hidden), nn.ReLU(),
            nn.Linear(settings.hidden, 1), nn.Sigmoid(),
        ).to(batch.device)  # fmt: skip
    optimizers = [torch.optim.Adam(v.parameters(), settings.inner_lr) for _ in range(2)]
    for _ in range(settings.inner_steps):
        for optimizer, x, aim in zip(optimizers, (batch, clean), (1.0, 0.0), strict=True):
            loss = (v(x) - aim).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return adjusted_outlyingness(v(batch)[:, 0]) > settings.outlyingness


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    labels, inputs, device = received.labels, received.inputs, received.device
    activations = received.layer(settings.layer)
    trusted = received.clean.nonzero().flatten()
    model = received.network(seed, "asset")
    down, up = (torch.optim.Adam(model.parameters(), settings.lr) for _ in range(2))
    g = seeds.generator(seed, "asset", "order")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, "asset", "dropout"))
        model.train()
        for epoch in trange(settings.epochs, desc="asset", unit="epoch"):
            for number, rows in enumerate(batches(len(labels), settings.batch, g, device)):
                count = min(settings.batch, len(trusted))
                clean = trusted[torch.randperm(len(trusted), generator=g)[:count].to(device)]
                loss = model(inputs[clean]).var(1).mean()
                down.zero_grad(set_to_none=True)
                loss.backward()
                down.step()
                stream = seeds.derive(seed, "asset", "inner", epoch, number)
                suspects = rows[outliers(activations[rows], activations[clean], settings, stream)]
                if len(suspects) > 1:
                    loss = -F.cross_entropy(model(inputs[suspects]), labels[suspects])
                    up.zero_grad(set_to_none=True)
                    loss.backward()
                    up.step()
    return F.cross_entropy(in_blocks(model.eval(), inputs), labels, reduction="none")


def threshold(score: Tensor, level: float, released_cut: bool) -> float:
    """The cut, from the scores at or below the median."""
    lower = score[score <= score.median()].double()
    mean, deviation = lower.mean().item(), max(lower.std(correction=0).item(), 1e-12)
    unit = deviation * math.sqrt(2 * math.pi)
    squared = -2 * math.log(level) * unit if released_cut else -2 * math.log(level * unit)
    return mean + deviation * math.sqrt(max(squared, 0.0))


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    return score >= threshold(score, settings.level, settings.released_cut)
