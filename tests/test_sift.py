"""Sifting: neighbours against scikit-learn, s(x) against Python sets, seeds on planted clusters."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.classifier import Classifier
from tcore.models.encoder import Encoder, extract_depths, floats
from tcore.stages import sift
from tcore.stages._clusters import largest_cluster, smallest

SETTINGS = sift.Settings(seed_share=0.05, neighbours=20)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- neighbours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 300])
def test_the_nearest_are_those_of_a_brute_force_search(offset):
    points = normal(250, 7) + offset
    brute = NearestNeighbors(n_neighbors=13, algorithm="brute").fit(points.double().numpy())
    expected = brute.kneighbors(return_distance=False)  # of a fitted point, without the point itself
    found = sift.nearest(points, 13, 64).numpy()
    # float32 may swap two at almost the same distance: what is compared is distance
    distance = np.linalg.norm(points.double().numpy()[:, None] - points.double().numpy()[None], axis=2)
    rows = np.arange(250)[:, None]
    np.testing.assert_allclose(distance[rows, found], distance[rows, expected], atol=1e-3)
    assert (found == expected).mean() > 0.99


@pytest.mark.parametrize("block", [1, 7, 249, 250, 4096])
def test_the_block_size_changes_nothing(block):
    points = normal(250, 7)
    assert torch.equal(sift.nearest(points, 9, block), sift.nearest(points, 9, 100))


def test_a_point_is_not_its_own_neighbour_but_its_twin_is():
    points = normal(40, 5).repeat(2, 1)
    assert sift.nearest(points, 1, 32).flatten().tolist() == [*range(40, 80), *range(40)]


def test_of_equally_near_ones_topk_says_which_and_in_which_order():
    points = torch.randint(0, 3, (300, 3), generator=torch.Generator().manual_seed(0)).float()
    centred = points - points.mean(0)
    distance = centred.square().sum(1) - 2 * centred @ centred.T
    expected = distance.fill_diagonal_(torch.inf).topk(20, largest=False).indices
    assert torch.equal(sift.nearest(points, 20, 300), expected)


@pytest.mark.parametrize("n, m", [(1, 1), (9, 9), (50, 1), (50, 0), (101, 7), (1000, 60)])
def test_the_smallest_of_a_row_are_those_that_sorting_finds(n, m):
    values = normal(6, n)
    found, columns = smallest(values, m)
    assert torch.equal(found, values.sort(1).values[:, :m])
    assert torch.equal(values.gather(1, columns), found)
    assert all(len(set(row)) == m for row in columns.tolist())  # no column twice


# --- consistency --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [5, 64, 1000])
def test_consistency_is_the_size_of_an_intersection_of_sets(block):
    n, m = 90, 25
    layers = [normal(n, 4), normal(n, 4) + normal(n, 4, seed=1), normal(n, 6, seed=2)]
    layers[2][:, :4] += 2 * layers[0]
    labels = torch.arange(n) % 3
    score, spread = sift.consistency(layers, labels, m, block)
    positive = 0
    for x in range(n):
        lists = []
        for layer in layers:
            order = (layer.double() - layer[x].double()).norm(dim=1).argsort().tolist()
            lists.append(set([i for i in order if i != x][:m]))
        shared = set.intersection(*lists) & {i for i in range(n) if labels[i] == labels[x]}
        assert score[x] == len(shared)
        distances = [(layers[0][x] - layers[0][i]).norm().item() for i in shared]
        assert spread[x].item() == pytest.approx(np.mean(distances) if shared else 0, abs=1e-5)
        positive += len(shared) > 0
    assert positive > 20  # the check was not of zeros alone


def test_consistency_is_m_where_nothing_moves_and_all_is_one_class():
    layer = normal(60, 4)
    score, _ = sift.consistency([layer, layer * 2, layer + 1], torch.zeros(60, dtype=torch.long), 11, 64)
    assert score.tolist() == [11] * 60


# --- the largest cluster ------------------------------------------------------------------------


def largest(points: np.ndarray, min_samples: int, majority: float, block: int = 16) -> np.ndarray:
    return largest_cluster(torch.from_numpy(points), min_samples, majority, block)


def line(*gaps: float) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(gaps)])[:, None].astype(np.float32)


# Whole numbers, so that equal distances are equal in float32 as well.
def test_a_row_of_points_and_two_far_off():
    points = line(*[1] * 17, 50, 90)
    assert largest(points, 2, 0.5).tolist() == [True] * 18 + [False] * 2


def test_of_two_clusters_the_larger():
    points = line(*[1] * 11, 50, *[1] * 23)  # 12 points, a gap, 24 points
    assert largest(points, 3, 0.5).tolist() == [False] * 12 + [True] * 24


def test_a_tight_minority_beside_a_loose_majority():
    # 12 close points, then 30 with gaps of 8, behind a gap of 20: the radius has to reach 8 but not 20
    points = line(*[1] * 11, 20, *[8] * 29, *[400] * 8)
    assert largest(points, 2, 0.33).tolist() == [False] * 12 + [True] * 30 + [False] * 8
    assert largest(points, 2, 0.2).tolist() == [True] * 12 + [False] * 38  # too small a majority
    assert largest(points, 2, 0.7).tolist() == [True] * 42 + [False] * 8  # too large a one


def test_the_radius_is_the_smallest_that_will_do():
    points = normal(200, 3).numpy()
    found = largest(points, 5, 0.4)
    distance = np.linalg.norm(points[:, None].astype(float) - points[None], axis=2)
    kth = np.sort(distance, axis=1)[:, 4]
    shares = []
    for level in range(1, 100):
        cluster = DBSCAN(eps=np.percentile(kth, level), min_samples=5).fit(points.astype(float)).labels_
        sizes = np.bincount(cluster[cluster >= 0], minlength=1)
        shares.append(sizes.max() / 200)
        if shares[-1] >= 0.4:
            assert found.tolist() == (cluster == sizes.argmax()).tolist()
            break
    assert shares == sorted(shares) and 5 < len(shares) < 99


def test_where_no_radius_gathers_the_majority_all_of_the_class_counts():
    # 5 equal groups: their inner distances are all there is to choose a radius from
    points = line(*([1] * 4 + [100]) * 5)[:-1]
    assert largest(points, 5, 0.33).tolist() == [True] * 25


def test_links_that_go_further_than_the_lists_of_neighbours():
    # Three places of 30 points each: a list of 16 holds points of one place alone. Then a row of 30.
    points = np.concatenate([np.repeat([0, 1, 2], 30), np.arange(10, 40)])[:, None].astype(np.float32)
    assert largest(points, 2, 0.5).tolist() == [True] * 90 + [False] * 30
    assert largest(points, 2, 0.25).tolist() == [True] * 30 + [False] * 90  # before they are joined


def bisected(points: np.ndarray, min_samples: int, majority: float) -> np.ndarray:
    """The same with scikit-learn, from all pairs."""
    tensor = torch.from_numpy(points)
    distance = torch.cdist(tensor, tensor, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    kth = np.sort(distance, axis=1)[:, min_samples - 1]
    found, low, high = np.ones(len(points), bool), 0, 100
    while high - low > 1:
        level = (low + high) // 2
        radius = max(np.percentile(kth, level), 1e-12)
        cluster = DBSCAN(eps=radius, min_samples=min_samples, metric="precomputed").fit(distance).labels_
        members = cluster == np.bincount(cluster[cluster >= 0]).argmax()
        found, low, high = (members, low, level) if members.mean() >= majority else (found, level, high)
    return found


def unequal(n: int, dim: int, random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(n, dim)) * random.choice([0.01, 1, 30], (n, 1))


# Ties, and distances that a matrix product in float32 cannot tell apart
PLANTED = {
    "one cloud": lambda n, dim, random: random.normal(size=(n, dim)),
    "clouds": lambda n, dim, random: (
        random.normal(size=(n, dim)) + 8 * random.normal(size=(4, dim))[np.arange(n) % 4]
    ),
    "a grid": lambda n, dim, random: random.integers(0, 4, (n, dim)),
    "twins": lambda n, dim, random: random.normal(size=(n, dim))[random.integers(0, n, n) ** 3 // n**2],
    "all equal": lambda n, dim, random: np.full((n, dim), random.normal()),
    "unequal clouds, far off": lambda n, dim, random: unequal(n, dim, random) + 300,
    "a walk": lambda n, dim, random: np.cumsum(random.integers(1, 4, (n, dim)), 0),
    "close twins, far off": lambda n, dim, random: (
        random.normal(size=(5, dim))[np.arange(n) % 5] + 1e-3 * random.normal(size=(n, dim)) + 300
    ),
    "two places far apart": lambda n, dim, random: (
        1000 * (-1.0) ** np.arange(n)[:, None] + 0.01 * random.normal(size=(n, dim))
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_the_cluster_is_what_scikit_learn_finds_from_all_pairs(kind):
    random = np.random.default_rng(0)
    some = 0
    for n in (1, 2, 5, 17, 18, 60, 150, 201):
        for dim, majority in ((1, 0.35), (2, 0.5), (3, 0.7), (64, 0.2)):
            points = np.float32(PLANTED[kind](n, dim, random))
            min_samples = int(random.integers(1, min(n, 10) + 1))
            expected = bisected(points, min_samples, majority)
            assert largest(points, min_samples, majority).tolist() == expected.tolist()
            some += not expected.all()
    assert some >= 10 or kind == "all equal"


# --- memory -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_memory_is_linear_in_the_number_of_samples():
    found = []
    for n in (2000, 4000):
        labels = torch.zeros(n, dtype=torch.long)
        layers = [normal(n, 3, seed=seed) + 5 * (normal(n, 1, seed=9) > 1) for seed in range(3)]
        with Largest() as mode:
            sift.sift(layers, labels, replace(SETTINGS, block=16))
        found.append(mode.numel)
    assert found[1] <= 2 * found[0] and found[0] < 2000**2 / 20


# --- seeds --------------------------------------------------------------------------------------


def planted() -> tuple[list[Tensor], Tensor, Tensor]:
    """Layers, labels and the poisons of three classes.

    A clean sample stays near its place in the class's cluster. Class 0 also holds 50 poisons: tight
    and apart at layer 1, in the middle of the class's cluster at the others.
    """
    labels = torch.arange(450) % 3
    poison = torch.zeros(450, dtype=torch.bool)
    poison[(labels == 0).nonzero().flatten()[:50]] = True
    centres = 12 * torch.eye(4)[:3]
    place = centres[labels] + normal(450, 4)
    first = torch.where(poison[:, None], torch.tensor([0.0, 0, 0, 25]) + 0.1 * normal(450, 4, seed=1), place)
    later = torch.where(poison[:, None], centres[0] + 0.1 * normal(450, 4, seed=2), place)
    return [first, later + 0.1 * normal(450, 4, seed=3), 2 * later], labels, poison


def test_seeds_on_planted_clusters():
    layers, labels, poison = planted()
    table = sift.sift(layers, labels, SETTINGS)
    assert table["index"].tolist() == list(range(450))
    assert table["label"].tolist() == labels.tolist()
    assert table[table.trusted].groupby("label").size().tolist() == [7, 7, 7]  # floor(0.05 * 150)
    assert not table.trusted[poison.numpy()].any()
    assert not table.in_core[poison.numpy()].any()
    nearly_all = sift.sift(layers, labels, replace(SETTINGS, majority=0.95))
    assert nearly_all.in_core[nearly_all.label > 0].mean() > 0.85  # and of the classes without poisons
    assert table.in_core[table.trusted].all()
    score, spread = sift.consistency(layers, labels, 20, 2048)
    assert table.score.tolist() == score.tolist()
    for _, rows in table[table.in_core].groupby("label"):
        # nobody else in the core has a larger s, or an equal one and closer neighbours
        order = [(-score[i].item(), spread[i].item()) for i in rows.index]
        inside = [o for o, trusted in zip(order, rows.trusted, strict=True) if trusted]
        outside = [o for o, trusted in zip(order, rows.trusted, strict=True) if not trusted]
        assert max(inside) < min(outside)


def test_seeds_follow_the_samples_not_their_order():
    layers, labels, _ = planted()
    table = sift.sift(layers, labels, SETTINGS)
    order = torch.randperm(450, generator=torch.Generator().manual_seed(5))
    shuffled = sift.sift([layer[order] for layer in layers], labels[order], SETTINGS)
    assert set(order[torch.from_numpy(shuffled.trusted.to_numpy(copy=True))].tolist()) == set(
        table.index[table.trusted]
    )


def test_random_seeds_are_as_many_of_each_class_and_take_no_notice_of_poisons():
    layers, labels, poison = planted()
    tables = [sift.sift(layers, labels, replace(SETTINGS, rule="random"), seed) for seed in range(20)]
    assert all(t[t.trusted].groupby("label").size().tolist() == [7, 7, 7] for t in tables)
    among = np.mean([t.trusted[poison.numpy()].sum() for t in tables])
    assert 7 / 3 - 1 < among < 7 / 3 + 1  # a third of class 0 are poisons; standard error 0.3
    again = sift.sift(layers, labels, replace(SETTINGS, rule="random"), 3)
    assert again.equals(tables[3]) and not again.equals(tables[4])
    with pytest.raises(InputError, match=r"sift.rule = 'tis' should be one of"):
        sift.sift(layers, labels, replace(SETTINGS, rule="tis"))


def test_a_core_that_is_too_small_is_filled_up_by_consistency():
    # In one dimension each: layer 1 keeps samples 0 to 59 together, layer 2 samples 40 to 99.
    one, two = torch.arange(100.0), torch.arange(100.0)
    one[60:] += 50.0 * torch.arange(1, 41)
    two[:40] -= 50.0 * torch.arange(40, 0, -1)
    labels = torch.zeros(100, dtype=torch.long)
    settings = sift.Settings(seed_share=0.3, neighbours=6, min_samples=3, majority=0.55)
    table = sift.sift([one[:, None], two[:, None]], labels, settings)
    assert table.index[table.in_core].tolist() == list(range(40, 60))
    assert table.trusted.sum() == 30 and table.trusted[table.in_core].all()
    outside = table[~table.in_core]
    assert outside.score[outside.trusted].min() >= outside.score[~outside.trusted].max()


def test_a_class_too_small_for_a_seed_is_named():
    layers, labels, _ = planted()
    labels[:10] = 3
    with pytest.raises(InputError, match=r"sift.seed_share 0.05 .*fewer than 20 images .*\{3: 10\}"):
        sift.sift(layers, labels, SETTINGS)


def test_activations_are_the_encoders_depths_the_features_and_two_hidden_layers_without_dropout():
    encoder = Encoder("resnet_tiny", 16)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    model = Classifier(encoder, heads.new_head(encoder.dim, 3, heads.Settings(hidden=(12, 8)), 0)).eval()
    unit = SimpleNamespace(fc1=model.head.fc1, fc2=model.head.fc2)
    with torch.no_grad():
        x, stages = (floats(images) - encoder.mean) / encoder.std, []
        for part in encoder:
            x = part(x)
            stages.append(x)
        h1 = unit.fc1(x / x.norm(dim=1, keepdim=True)).clamp(min=0)
        # conv1, bn1, relu, maxpool, then four stages and the mean
        expected = [*(stage.mean((2, 3)) for stage in stages[4:7]), x, h1, unit.fc2(h1).clamp(min=0)]
    found = sift.activations(model.train(), x, images, SETTINGS)
    for layer, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(layer, wanted)
        assert not layer.requires_grad
    encoder.register_forward_hook(lambda *_: pytest.fail("the paper's layers need no pass over the images"))
    paper = replace(SETTINGS, depths=())
    assert [layer.shape[1] for layer in sift.activations(model, x, images, paper)] == [128, 12, 8]
    with pytest.raises(InputError, match=r"sift.depths = \(1.0,\) should be shares"):
        sift.activations(model, x, images, replace(SETTINGS, depths=(1.0,)))


@pytest.mark.parametrize("architecture", ["vit", "efficientnet_lite0", "torchvision:mobilenet_v2"])
def test_depths_of_an_image_are_its_own_whatever_the_batch(architecture, monkeypatch):
    encoder = Encoder(architecture, 32)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    whole = extract_depths(encoder, images, (0.25, 0.5, 0.75))
    monkeypatch.setattr("tcore.models.encoder.block", lambda device: 3)
    parts = extract_depths(encoder, images.flip(0), (0.25, 0.5, 0.75))
    for one, other in zip(whole, parts, strict=True):
        assert one.ndim == 2 and one.std(0).max() > 0
        torch.testing.assert_close(one, other.flip(0), rtol=1e-4, atol=1e-4)


def test_poisons_that_the_encoder_put_into_the_middle_of_their_class_are_apart_before():
    layers, labels, poison = planted()
    moved = 3 * [layers[2]]  # as a poisoned encoder leaves them: no layer from its output on has them apart
    assert sift.sift(moved, labels, SETTINGS).in_core[poison.numpy()].mean() > 0.9
    table = sift.sift([layers[0], *moved], labels, SETTINGS)
    assert not table.in_core[poison.numpy()].any() and not table.trusted[poison.numpy()].any()
    assert table.score.equals(sift.sift(moved, labels, SETTINGS).score)
