"""Activation Clustering (Chen et al., SafeAI 2019): in the target class activations form two clusters.

Per class: activations, centred, projected on their top `dimensions` right singular vectors, k-means
with two clusters. With a and b the centres of the larger and the smaller cluster,

    score(x) = (|x - a|^2 - |x - b|^2) / |a - b|^2          > 0 just in the smaller cluster
    flag: the smaller cluster of a class, if it holds less than `share` of the class

It needs a model trained on everything; no clean data, no rate, no batch norm. The size test is the one of
the implementation that T-Core used; its silhouette test is computed there and never applied, and the
paper's ICA and retraining tests are left out. Published code has only the clusters; the score that
ranks within them is ours, and k-means is seeded here. Known weakness: two natural sub-classes are flagged.

Cost: one forward pass of every sample through the head, on cached features, and k-means for every class.
"""

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from tcore import seeds
from tcore.defenses._interface import Received

KIND = "detector"
CLEAN = False
NEEDS_NORM = False
ORACLE = ()


@dataclass(frozen=True)
class Settings:
    dimensions: int = 10  # singular directions kept, in [1, inf) [code]
    share: float = 0.35  # a cluster of this share of its class or more is not flagged, in [0, 1] [code]
    layer: str = "penultimate"  # whose activations are clustered, one of encoder, hidden, penultimate [paper]
    starts: int = 10  # k-means runs from so many starts and takes the best, in [1, inf) [open]


def margin(points: Tensor, starts: int, seed: int) -> Tensor:
    """The score (n,) of the points (n, d) of one class."""
    found = KMeans(2, n_init=starts, random_state=seed % 2**32).fit(points.cpu().numpy())
    large = int((found.labels_ == 1).sum() > len(points) / 2)
    centres = torch.from_numpy(found.cluster_centers_).to(points)
    a, b = centres[large], centres[1 - large]
    return ((points - a).square().sum(1) - (points - b).square().sum(1)) / (a - b).square().sum()


def score(received: Received, settings: Settings, seed: int) -> Tensor:
    features = received.layer(settings.layer).double()
    found = torch.full((len(features),), -1.0, dtype=torch.float64, device=features.device)
    for k in received.labels.unique().tolist():
        rows = received.labels == k
        centred = features[rows] - features[rows].mean(0)
        if len(centred) < 2 or not centred.any():
            continue  # nothing to cluster
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -settings.dimensions :]
        found[rows] = margin(centred @ directions, settings.starts, seeds.derive(seed, "ac", k))
    return found


def flag(score: Tensor, received: Received, settings: Settings) -> Tensor:
    inside = score > 0
    sizes = torch.bincount(received.labels, minlength=received.classes)
    small = torch.bincount(received.labels[inside], minlength=received.classes)
    return inside & (small < settings.share * sizes)[received.labels]
