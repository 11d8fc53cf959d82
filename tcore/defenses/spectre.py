"""SPECTRE (Hayase et al., ICML 2021): robust covariance, then quantum entropy scores.

Per class, with eps poisons expected in the whole set and U the class's centred activations in their
top singular directions (at most `dimensions`); for each k of 1, 4, 9, ... 100:

    P = U[:, :k];  S = robust covariance of P (below);  W = P S^-1/2                  (n, k)
    Q = exp(alpha (C - I) / (|C|_2 - 1)) / trace,  C = W'W / n        a true matrix exponential
    tau_i = w_i' Q w_i;  survivors: all but the 1.5 eps largest tau
    all of U whitened by the covariance of these survivors: its Q and tau, and tr(C Q), the mean of tau

score = this last tau of the k with the largest mean (the released code chooses k by it too, but drops
by the first tau). flag: the 1.5 eps largest, at most half, of every class.

Robust covariance (Diakonikolas et al., 2017): whiten; drop points of norm^2 >= 10 k ln(n / tau);
otherwise let q be the unit matrix with the largest variance of w' q w (2 for a Gaussian) and, where
half of it exceeds 1 + 10 e ln^2(1 / e), drop those beyond the point where the empirical tail of
|w' q w - median| / sqrt 2 exceeds 3 e / (T ln T)^2. Until nothing is dropped, or 2 eps points are.

It needs a model trained on everything and the number of poisons: `poison_rate` is a guess, the true one
belongs to an oracle variant. `suspects` chooses where to remove: all classes (as T-Core's numbers
show), those whose tr(C Q) is above the median, or the one with the largest (both in circulating
implementations). Where the filter drops nothing, C = I and Q = I / k. Defects of ports avoided: an
element-wise exponential, an element-wise product in the trace, a tail test on the share below.
Whitening is cut at a relative `1e-6`; k stays below a third of the class.

Where a large share of a class is poison, the filter has nothing to call an outlier. Whitened by all samples,
the tight cluster of poisons lies nearer to the centre than the clean samples, which then rank as more
suspicious (docs/lab/detectors.md).

Cost: one forward pass of every sample through the head, on cached features, and the above for every k.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tcore.defenses import _selection as selection
from tcore.defenses._interface import Received
from tcore.files import InputError

KIND = "detector"
CLEAN = False
NEEDS_NORM = False
ORACLE = ("poison_rate",)
SUSPECTS = ("all", "median", "worst")


@dataclass(frozen=True)
class Settings:
    poison_rate: float = 0.01  # share of poisons in the whole set, a guess, in [0, 1] [as spectral]
    layer: str = "penultimate"  # whose activations are looked at, one of encoder, hidden, penultimate [open]
    suspects: str = "all"  # classes that lose samples, one of all, median, worst [paper: the target]
    dimensions: int = 100  # singular directions at most, in [1, inf); k is a square up to it [code]
    alpha: float = 4.0  # sharpness of the quantum entropy score, in [0, inf) [paper]
    factor: float = 1.5  # samples dropped per poison expected, in [0, inf) [paper]
    cap: float = 0.5  # a class loses no larger share than this, in [0, 1] [open]


def whitener(points: Tensor) -> Tensor:
    """The inverse square root (k, k) of the second moment of points (n, k)."""
    values, vectors = torch.linalg.eigh(points.T @ points / len(points))
    inverse = values.clamp(min=values.max().clamp(min=1e-30) * 1e-6).rsqrt()
    return vectors * inverse @ vectors.T


def entropy_weights(covariance: Tensor, alpha: float) -> Tensor:
    """Q (k, k) of trace 1: exp(alpha (C - I) / (|C| - 1))."""
    values, vectors = torch.linalg.eigh(covariance)
    excess = (values.max() - 1).clamp(min=1e-6)  # of rounding alone where C is the identity
    weights = torch.softmax(alpha * (values - 1) / excess, 0)  # exp over its sum: the trace is 1
    return vectors * weights @ vectors.T


def quadratic(points: Tensor, matrix: Tensor) -> Tensor:
    """w' M w of every row."""
    return (points @ matrix * points).sum(1)


def widest(points: Tensor, start: Tensor | None = None, steps: int = 20, tolerance: float = 1e-2) -> Tensor:
    """The symmetric unit matrix q (k, k) with the largest variance of w' q w, by power iteration."""
    far = points[points.square().sum(1).argmax()]
    q = far.outer(far) if start is None else start
    for _ in range(steps):
        q = q / q.norm().clamp(min=1e-30)
        values = quadratic(points, q)
        last, q = q, (points * (values - values.mean())[:, None]).T @ points / len(points)
        if (q / q.norm().clamp(min=1e-30) - last).norm() < tolerance:
            break
    return q / q.norm().clamp(min=1e-30)


def tail_cut(deviation: Tensor, rate: float) -> Tensor:
    """Which deviations (n,) to drop: all beyond the first T that more of them pass than a Gaussian allows."""
    ordered, order = deviation.sort()
    above = 1 - torch.arange(len(ordered), device=ordered.device) / len(ordered)
    t = (ordered - 3).clamp(min=1.0 + 1e-9)
    allowed = torch.where(t <= 10 * math.log(1 / rate), 1.0, 3 * rate / (t * t.log()).square())
    heavy = (above > allowed).nonzero().flatten()
    drop = torch.zeros_like(deviation, dtype=torch.bool)
    if len(heavy):
        drop[order[heavy[0] :]] = True
    return drop


def robust_whitener(points: Tensor, rate: float, most: int, tau: float = 0.1) -> Tensor:
    """`whitener` of the points (n, k) that the filter leaves; it drops at most `most`."""
    n, k = points.shape
    left, q = points, None
    while True:
        transform = whitener(left)
        white = left @ transform
        drop = white.square().sum(1) >= 10 * k * math.log(len(left) / tau)
        if not drop.any():
            q = widest(white, q)
            values = quadratic(white, q)
            if values.var() / 2 <= 1 + 10 * rate * math.log(1 / rate) ** 2:
                return transform
            drop = tail_cut((values - values.median()).abs() / math.sqrt(2), rate)
        if not drop.any() or n - len(left) + int(drop.sum()) > most:
            return transform
        left = left[~drop]


def scores_of_class(activations: Tensor, poisons: int, settings: Settings) -> Tensor:
    """tau (n,) of the best k, from a class's activations (n, d) float64."""
    centred = activations - activations.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    rank = int((values > values.max() * 1e-9).sum())
    size = max(1, min(settings.dimensions, rank, len(centred) // 3))
    points = centred @ vectors.flip(1)[:, :size]
    drop = min(int(settings.factor * poisons), int(settings.cap * len(points)))
    rate = min(max(poisons, 1) / len(points), 0.3)
    best, found = -math.inf, torch.zeros(len(points), dtype=points.dtype, device=points.device)
    for k in (side**2 for side in range(1, math.isqrt(size) + 1)):
        white = points[:, :k] @ robust_whitener(points[:, :k], rate, 2 * poisons)
        tau = quadratic(white, entropy_weights(white.T @ white / len(white), settings.alpha))
        survivors = points[tau.argsort(stable=True)[: len(points) - drop]]
        common = (points - survivors.mean(0)) @ whitener(survivors - survivors.mean(0))
        covariance = common.T @ common / len(common)
        tau = quadratic(common, entropy_weights(covariance, settings.alpha))
        if tau.mean() > best:
            best, found = tau.mean().item(), tau
    return found


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    features = received.layer(settings.layer).double()
    poisons = int(settings.poison_rate * len(features) + 1e-9)
    found = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for k in received.labels.unique():
        rows = received.labels == k
        found[rows] = scores_of_class(features[rows], min(poisons, int(rows.sum()) // 2), settings)
    return found


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    if settings.suspects not in SUSPECTS:
        raise InputError(f"spectre.suspects = {settings.suspects!r} should be one of {SUSPECTS}")
    poisons = int(settings.poison_rate * len(score) + 1e-9)
    found = selection.worst(score, received.labels, int(settings.factor * poisons), settings.cap)
    if settings.suspects == "all":
        return found
    classes = received.labels.unique()
    means = torch.stack([score[received.labels == k].mean() for k in classes])
    chosen = means == means.max() if settings.suspects == "worst" else means > means.median()
    return found & torch.isin(received.labels, classes[chosen])
