"""The largest DBSCAN cluster of a set of points, exactly, in memory linear in their number.

DBSCAN joins core points within the radius of each other. Most of these links are between near neighbours,
so each point's nearest are listed once. Where the radius goes further than the lists do, the core points
outside the largest component are compared with the others.

Distances are summed from differences, as DBSCAN on `torch.cdist` has them. A matrix product is many times as
fast, and rules most pairs out or in: for centred x and y of dimension d, with N = |x|^2 + |y|^2,

    N - 2 x.y - c N  <=  distance^2  <=  N - 2 x.y + c N,    c = (2 d + 16) eps

c bounds what rounding does to both sides, at worst: d eps N each to the product with the norms and to the
distance, 16 eps N to single operations. Pairs in between are summed from differences.
"""

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

LISTED = 16  # length of a point's list, or twice min_samples if that is more


def smallest(values: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m smallest of each row of values (b, n), ascending, and their columns.

    Much faster than `topk` alone on long rows: the m groups with the smallest minima hold them.
    """
    n = values.shape[1]
    width = max(1, int((n / max(m, 1)) ** 0.5))
    groups = n // width
    minima = values[:, : groups * width].unflatten(1, (width, groups)).amin(1)
    picked = minima.topk(m, largest=False, sorted=False).indices
    steps = groups * torch.arange(width, device=values.device)
    rest = torch.arange(groups * width, n, device=values.device).expand(len(values), -1)
    columns = torch.cat([(picked[:, None] + steps[:, None]).flatten(1), rest], 1)
    found, place = values.gather(1, columns).topk(m, largest=False)
    return found, columns.gather(1, place)


def distances(one: Tensor, other: Tensor) -> Tensor:
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def merge(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Labels (n,) of components, in the order of their first points, after links from `one` to `other`."""
    shape = (labels.max() + 1, labels.max() + 1)
    links = coo_array((np.ones(len(one), bool), (labels[one], labels[other])), shape)
    return connected_components(links, directed=False)[1][labels]


class Cloud:
    """Points (n, d), and for each of them a list of near others.

    near, distance  (n, q) the list
    reach           (n,)   no point outside the list is nearer than that
    kth             (n,)   distance to the min_samples-th nearest, itself included, which the list has
    """

    def __init__(self, points: Tensor, min_samples: int, block: int):
        self.points, self.block = points, block
        self.centred = points - points.mean(0)
        self.norms = self.centred.square().sum(1)
        self.rounding = (2 * points.shape[1] + 16) * torch.finfo(points.dtype).eps
        everyone = torch.arange(len(points), device=points.device)
        n, q = len(points), min(len(points) - 1, max(LISTED, 2 * min_samples))
        # places for all, as small tensors kept between large ones that go would split up the heap
        found = (everyone.new_empty(n, q), *(points.new_empty(shape) for shape in ((n, q), n, n)))
        for rows in everyone.split(block):
            for whole, part in zip(found, self._list(rows, everyone, q, min_samples), strict=True):
                whole[rows] = part
        self.near, self.distance, self.reach, self.kth = (whole.cpu().numpy() for whole in found)

    def _below(self, rows: Tensor, columns: Tensor | slice) -> Tensor:
        """Lower bounds (b, c) on the squared distances between points `rows` and `columns`."""
        norms = self.norms * (1 - self.rounding)
        product = self.centred[rows] @ self.centred[columns].T
        return torch.sub(norms[columns], product, alpha=2, out=product).add_(norms[rows, None])

    def _list(self, rows: Tensor, everyone: Tensor, q: int, min_samples: int) -> tuple[Tensor, ...]:
        """`near`, `distance`, `reach`, `kth` of points `rows`."""

        def kth() -> Tensor:
            itself = distance.new_zeros(len(rows), 1)
            return torch.cat([itself, distance], 1).sort(1).values[:, min_samples - 1]

        below = self._below(rows, slice(None))
        below[rows[:, None] == everyone] = torch.inf
        bounds, near = smallest(below, q + 1)
        near, reach = near[:, :q], bounds[:, q].clamp(min=0).sqrt()
        distance = distances(self.points[rows, None], self.points[near]).flatten(1)
        unsure = kth() > reach
        if unsure.any():
            exact = distances(self.points[rows[unsure]], self.points)
            exact[rows[unsure, None] == everyone] = torch.inf
            values, columns = smallest(exact, q + 1)
            near[unsure], distance[unsure], reach[unsure] = columns[:, :q], values[:, :q], values[:, q]
        return near, distance, reach, kth()

    def largest(self, level: int, enough: float = np.inf) -> np.ndarray:
        """Members (boolean) of the largest DBSCAN cluster; the radius is the percentile `level` of `kth`.

        Some of them only, where their core points are a share `enough` of all points.
        As scikit-learn has it, clusters come in the order of their first core points, a border point belongs
        to the first that reaches it, and of equal ones the first is the largest.
        """
        radius = max(float(np.percentile(self.kth, level)), 1e-12)
        core = self.kth <= radius
        reached = core[self.near] & (self.distance <= radius)
        rows, place = (core[:, None] & reached).nonzero()
        labels = merge(np.arange(len(core)), rows, self.near[rows, place])
        labels = self._join(labels, core, radius, enough)
        border = np.where(reached, labels[self.near], len(core)).min(1, initial=len(core))
        labels = np.where(core, labels, border)
        return labels == np.bincount(labels)[: len(core)].argmax()

    def _join(self, labels: np.ndarray, core: np.ndarray, radius: float, enough: float) -> np.ndarray:
        """`labels` after the links that the lists lack: both ends' reach is within the radius.

        The component with the most such ends need not look for links: the others find theirs to it.
        """
        rows = ends = np.flatnonzero(core & (self.reach <= radius))
        if not len(ends):
            return labels
        hub = ends[np.bincount(labels[ends])[labels[ends]].argmax()]
        while len(rows := rows[labels[rows] != labels[hub]]):
            if np.bincount(labels[core]).max() / len(labels) >= enough:
                break
            part, rows = rows[: self.block], rows[self.block :]
            one, other, sure = self._close(part, ends, labels, radius)
            labels = merge(labels, one[sure], other[sure])
            labels = self._settle(labels, one[~sure], other[~sure], radius)
        return labels

    def _close(
        self, part: np.ndarray, ends: np.ndarray, labels: np.ndarray, radius: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of `part` and `ends`, unlike in label, that may be within the radius; which surely are."""
        rows, columns = (torch.from_numpy(x).to(self.points.device) for x in (part, ends))
        below = self._below(rows, columns)
        below[torch.from_numpy(labels[part, None] == labels[ends]).to(rows.device)] = torch.inf
        i, j = (below <= radius**2).nonzero().T
        one, other = rows[i], columns[j]
        above = below[i, j] + 2 * self.rounding * (self.norms[one] + self.norms[other])
        return one.cpu().numpy(), other.cpu().numpy(), (above <= radius**2).cpu().numpy()

    def _settle(self, labels: np.ndarray, one: np.ndarray, other: np.ndarray, radius: float) -> np.ndarray:
        """`labels` after the links between those of the pairs that are within the radius."""
        step = LISTED * self.block
        while len(one):
            apart = labels[one] != labels[other]
            one, other = one[apart], other[apart]
            here, there = one[:step], other[:step]
            exact = distances(self.points[here, None], self.points[there, None]).flatten()
            close = exact.cpu().numpy() <= radius
            labels = merge(labels, here[close], there[close])
            one, other = one[step:], other[step:]
        return labels


def largest_cluster(points: Tensor, min_samples: int, majority: float, block: int) -> np.ndarray:
    """Members (boolean) of the largest DBSCAN cluster of points (n, d), at the smallest radius at which it
    holds the share `majority` of them.

    Radii are the percentiles 1 to 99 of the distances to the min_samples-th neighbour, a point itself
    included. The largest cluster grows with the radius, so bisection finds it; where no radius will do, all
    points are in.
    """
    cloud = Cloud(points, min_samples, block)
    low, high = 0, 100
    while high - low > 1:
        level = (low + high) // 2
        if cloud.largest(level, majority).mean() >= majority:
            high = level
        else:
            low = level
    return cloud.largest(high) if high < 100 else np.ones(len(points), bool)
