"""Topological Invariance Sifting: the first trusted samples of each class (paper: 4.1.1, Alg. 1).

On the suspect classifier's activations A_l, (n, d_l), a clean sample keeps its place, a poison is
moved between them:

    majority     B_k = intersection over l of the largest DBSCAN cluster of A_l[D_k]
    consistency  s(x) = | NN_1(x) & NN_2(x) & NN_3(x) & D_k |,  NN_l the m nearest of all of D
    seed samples the floor(share |D_k|) members of B_k with the largest s

The paper's three layers are the encoder's output and the head's first two. A poisoned encoder has moved
its triggered images before the first of these, into the middle of the target's class, and the head leaves
them there; so the majority rule, not the paper's, also asks the encoder at the shares `depths` of its
depth, where they still lie with the images that they were made of (measured: docs/lab/sifting.md).

The paper states neither DBSCAN's radius nor what breaks ties. Here the radius of a class and
layer is the smallest at which the largest cluster holds `majority` of the class, which should be
more than the poisons in it: a larger radius joins their cluster to the clean one, a smaller one
leaves theirs the largest. Where less than half of a class leaves too few in B_k, clusters of half of it
are asked, which meet more surely. Ties go to the smaller mean distance to the class's shared neighbours
at the encoder's output; a B_k that is too small is filled up by s.
`rule` random takes any samples of each class instead, to see what sifting is worth.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tcore import seeds
from tcore.files import InputError
from tcore.models.classifier import Classifier
from tcore.models.encoder import extract_depths
from tcore.stages._clusters import largest_cluster, smallest

RULES = ("invariance", "random")


@dataclass(frozen=True)
class Settings:
    seed_share: float = 0.01  # alpha, share of each class that becomes seeds, in (0, 1] [paper: App. A]
    rule: str = "invariance"  # what chooses the seed samples, one of invariance, random [paper: invariance]
    neighbours: int = 50  # m, nearest neighbours per layer, in [1, inf) [paper: App. A]
    min_samples: int = 5  # DBSCAN's core-point count, the point itself included, in [1, inf) [open]
    majority: float = 0.5  # share of a class in its largest cluster, in (0, 1]; sets DBSCAN's radius [open]
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)  # of the encoder, for B_k, in [0, 1); paper: none [ours]
    block: int = 256  # rows per block of the neighbour search (memory: some block x n floats), in [1, inf)


def activations(model: Classifier, features: Tensor, images: Tensor, settings: Settings) -> list[Tensor]:
    """The encoder at `depths`, its output, which `features` are, and the head's first two layers: (n, d_l)
    each, from uint8 images, eval mode."""
    if not all(0 <= depth < 1 for depth in settings.depths):
        raise InputError(
            f"sift.depths = {settings.depths} should be shares of the encoder's depth, in [0, 1)"
        )
    with torch.no_grad():
        h1, h2, _ = model.eval().head.activations(features)
    return [*extract_depths(model.encoder, images, settings.depths), features, h1, h2]


def nearest(points: Tensor, m: int, block: int) -> Tensor:
    """Indices (n, m) of the m nearest other rows of points (n, d), Euclidean, nearest first.

    `topk` says in which order those at the same distance come, and which of them are the last.
    """
    points = points - points.mean(0)
    norms = points.square().sum(1)
    found = torch.empty(len(points), m, dtype=torch.long, device=points.device)
    space = points.new_empty(min(block, len(points)), len(points))  # a new one for each block takes longer
    for rows in torch.arange(len(points), device=points.device).split(block):
        product = torch.mm(points[rows], points.T, out=space[: len(rows)])
        distance = torch.sub(norms, product, alpha=2, out=product)  # + |row|^2, the same for a whole row
        distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        values, columns = smallest(distance, m + 1)
        found[rows] = columns[:, :m]
        tied = (values[:, 1:] == values[:, :-1]).any(1)
        found[rows[tied]] = distance[tied].topk(m, largest=False).indices
    return found


def consistency(layers: list[Tensor], labels: Tensor, m: int, block: int) -> tuple[Tensor, Tensor]:
    """For each sample: s(x), (n,) int64, and the mean distance at layer 1 to the neighbours counted."""
    lists = [nearest(layer, m, block).split(block) for layer in layers]
    # places for all, as small tensors kept between large ones that go would split up the heap
    score, spread = torch.empty_like(labels, dtype=torch.long), layers[0].new_empty(len(labels))
    for rows, first, *others in zip(
        torch.arange(len(labels), device=labels.device).split(block), *lists, strict=True
    ):
        shared = labels[first] == labels[rows, None]
        for other in others:
            shared &= (first[:, :, None] == other[:, None]).any(2)
        distance = layers[0][first].sub_(layers[0][rows, None]).norm(dim=2)
        score[rows] = shared.sum(1)
        spread[rows] = (distance * shared).sum(1) / score[rows].clamp(min=1)
    return score, spread


def sift(layers: list[Tensor], labels: Tensor, settings: Settings, seed: int = 0) -> pd.DataFrame:
    """A row per sample: index, label, in_core (majority rule), score (s), trusted (a seed sample).

    `layers` as `activations` gives them, the last three for s.
    The random seed is for the rule `random` alone.
    """
    if settings.rule not in RULES:
        raise InputError(f"sift.rule = {settings.rule!r} should be one of {RULES}")
    classes, sizes = labels.unique(return_counts=True)
    least = int(np.ceil(1 / settings.seed_share))
    if (sizes < least).any():
        small = {int(k): int(size) for k, size in zip(classes, sizes, strict=True) if size < least}
        raise InputError(
            f"sift.seed_share {settings.seed_share} gives no seed sample in classes with fewer than {least} "
            f"images (class: images {small}); raise it, or leave these classes out"
        )
    m = min(settings.neighbours, len(labels) - 1)
    score, spread = consistency(layers[-3:], labels, m, settings.block)
    core = torch.ones(len(labels), dtype=torch.bool)
    trusted = torch.zeros(len(labels), dtype=torch.bool)
    for k, size in zip(classes.tolist(), sizes.tolist(), strict=True):
        members = (labels == k).nonzero().flatten()
        for share in sorted({settings.majority, max(settings.majority, 0.5)}):
            inside = [
                largest_cluster(layer[members], settings.min_samples, share, settings.block)
                for layer in layers
            ]
            core[members.cpu()] = torch.from_numpy(np.logical_and.reduce(inside))
            if core[members.cpu()].sum() >= int(settings.seed_share * size):
                break
        rank = np.lexsort(
            (spread[members].cpu().numpy(), -score[members].cpu().numpy(), ~core[members.cpu()].numpy())
        )
        if settings.rule == "random":
            rank = torch.randperm(size, generator=seeds.generator(seed, "sift", k)).numpy()
        trusted[members.cpu()[torch.from_numpy(rank[: int(settings.seed_share * size)].copy())]] = True
    return pd.DataFrame(
        {
            "index": np.arange(len(labels)),
            "label": labels.cpu().numpy(),
            "in_core": core.numpy(),
            "score": score.cpu().numpy(),
            "trusted": trusted.numpy(),
        }
    )
