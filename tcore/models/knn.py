"""How well an encoder separates classes, without training anything: weighted nearest neighbours.

Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018: the k
nearest other images vote for their class with weight exp(cosine / T).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tcore.data.images import ImageSet
from tcore.models.encoder import Encoder, extract_features

LIMIT = 5000  # images that are looked at, spread over the set


def knn_accuracy(encoder: Encoder, images: ImageSet) -> float | None:
    """Leave-one-out accuracy on the labelled images, on the encoder's device; None without two classes."""
    rows = torch.from_numpy((images.labels >= 0).nonzero()[0])
    rows = rows[torch.linspace(0, max(len(rows) - 1, 0), min(LIMIT, len(rows))).long()]
    labels = images.targets[rows].to(encoder.mean.device)
    if len(labels.unique()) < 2:
        return None
    features = extract_features(encoder, images.tensor[rows])
    return round((leave_one_out(features, labels) == labels).float().mean().item(), 4)


def leave_one_out(
    features: Tensor, labels: Tensor, k: int = 200, temperature: float = 0.1, block: int = 1024
) -> Tensor:
    """The class (n,) that the k nearest other rows of features (n, d) vote for."""
    features = F.normalize(features, dim=1)
    found = []
    for start in range(0, len(features), block):
        similar = features[start : start + block] @ features.T  # (b, n)
        similar.diagonal(start).fill_(-torch.inf)
        nearest, rows = similar.topk(min(k, len(features) - 1), dim=1)
        votes = similar.new_zeros(len(similar), int(labels.max()) + 1)
        found.append(votes.scatter_add_(1, labels[rows], (nearest / temperature).exp()).argmax(1))
    return torch.cat(found)
