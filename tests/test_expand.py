"""Expansion: quotas by hand, confusion and the clean subset on a planted poisoned set."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tcore.models import head as heads
from tcore.stages import expand

HEAD = heads.Settings(hidden=(64, 32), lr=0.01)
SETTINGS = expand.Settings(
    subset_share=0.3, round_share=0.08, trust=0.3, epochs=10, steps=200, lr=0.01, batch=32
)
ASKED = replace(SETTINGS, witnesses=3)
EVERYWHERE = torch.ones(400, dtype=torch.bool)


@pytest.fixture(scope="module")
def planted() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (400, 12), labels of four classes, seeds and 60 poisons of label 0 in a place of their own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    poison = torch.zeros(400, dtype=torch.bool)
    poison[(labels == 0).nonzero().flatten()[:60]] = True
    place = torch.where(poison, 4, labels)
    features = 3 * torch.eye(12)[place] + 0.5 * torch.randn(400, 12, generator=generator)
    trusted = torch.zeros(400, dtype=torch.bool)
    for k in range(4):
        trusted[((labels == k) & ~poison).nonzero().flatten()[:4]] = True
    return features, labels, trusted, poison


def grow(planted, settings=SETTINGS, seed: int = 0) -> Tensor:
    features, labels, trusted, _ = planted
    return expand.expand(features, labels, trusted, EVERYWHERE, 4, settings, HEAD, seed)[0]


def weakened(planted) -> Tensor:
    """Features whose poisons lie among class 1, moved a little towards a direction that they share."""
    features, _, _, poison = planted
    weak = features.clone()
    weak[poison] += torch.eye(12)[1] * 3 - torch.eye(12)[4] * 3 + 0.3 * torch.eye(12)[5]
    return weak


# --- which samples are taken --------------------------------------------------------------------


def test_the_highest_of_all_classes():
    values = torch.tensor([5.0, 9, 1, 7, 8])
    candidates = torch.tensor([True, False, True, True, True])
    assert sorted(expand.highest(values, candidates, 3).tolist()) == [0, 3, 4]


def test_the_highest_of_each_class_by_largest_remainder():
    # Of 5, 3 and 2 candidates take 4: 2.0, 1.2 and 0.8 become 2, 1 and 1.
    groups = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    values = torch.tensor([99.0, 1, 2, 3, 4, 5, 30, 10, 20, -7, -6])
    candidates = torch.ones(11, dtype=torch.bool)
    candidates[0] = False
    assert sorted(expand.highest(values, candidates, 4, groups).tolist()) == [4, 5, 6, 10]


@pytest.mark.parametrize("n", [1, 17, 100, 150])
def test_quotas_are_even_and_every_class_gives_its_highest(n):
    generator = torch.Generator().manual_seed(n)
    groups = torch.randint(0, 6, (200,), generator=generator)
    values = torch.randn(200, generator=generator)
    candidates = torch.rand(200, generator=generator) < 0.8
    taken = expand.highest(values, candidates, n, groups).numpy()
    assert len(set(taken)) == n
    for k in range(6):
        mine = ((groups == k) & candidates).nonzero().flatten().numpy()
        count = np.isin(taken, mine).sum()
        assert abs(count - n * len(mine) / candidates.sum().item()) < 1
        best = mine[np.argsort(-values.numpy()[mine])[:count]]
        assert set(best) == set(taken) & set(mine)


# --- confusion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong_label", ["shifted", "random"])
def test_confusion_unlearns_the_clean_mapping_and_keeps_the_poisons(planted, wrong_label):
    features, labels, trusted, poison = planted
    head = heads.new_head(12, 4, HEAD, 0, "x")
    heads.fit_head(head, features[~trusted], labels[~trusted], 10, 0, "x", bar=False)
    before = F.cross_entropy(head(features), labels, reduction="none").detach()
    settings = replace(SETTINGS, wrong_label=wrong_label)
    expand.confuse(head, features, labels, trusted, settings, torch.Generator().manual_seed(0))
    after = F.cross_entropy(head(features), labels, reduction="none").detach()
    rest = ~trusted
    assert roc_auc_score(~poison[rest], after[rest]) > 0.98
    assert after[trusted].min() > before[trusted].max()
    assert after[rest & ~poison].median() > 3 * after[poison].median()


# --- witnesses ----------------------------------------------------------------------------------


def test_places_count_from_the_largest_value_of_each_group():
    values = torch.tensor([5.0, 9, 1, 7, 8, 7])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    candidates = torch.tensor([True, False, True, True, True, True])
    assert expand.places(values, candidates, groups).tolist() == [0, 2, 1, 1, 0, 2]
    assert expand.places(values, ~torch.zeros(6, dtype=torch.bool), 0 * groups).tolist() == [4, 0, 5, 2, 1, 3]


def test_witnesses_learn_from_the_subset_alone(planted):
    features, labels, trusted, poison = planted
    lies = torch.where(trusted, labels, (labels + 1) % 4)
    found = [expand.testify(features, given, trusted, 4, ASKED, HEAD, 0, "x") for given in (labels, lies)]
    assert torch.equal(found[0][trusted], found[1][trusted])
    clean = ~trusted & ~poison
    assert found[0][clean].quantile(0.99) < found[1][clean].quantile(0.01)


def test_a_weak_trigger_is_seen_by_witnesses_and_not_by_confusion(planted):
    _, labels, trusted, poison = planted
    weak = weakened(planted)
    taken = [
        (expand.expand(weak, labels, trusted, EVERYWHERE, 4, asked, HEAD, 0)[0] > 0)[poison].sum()
        for asked in (SETTINGS, ASKED)
    ]
    assert taken[0] > 3 and taken[1] == 0


def test_a_strong_trigger_deceives_witnesses_and_not_confusion(planted):
    """20 poisons in 100 that the encoder puts right among the target's own."""
    features, labels, trusted, poison = planted
    strong, noise = features.clone(), torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    strong[poison] = 3 * torch.eye(12)[0] + 0.5 * noise[poison]
    poison = poison & (poison.cumsum(0) <= 20)
    strong[poison] = 6 * torch.eye(12)[0] + 0.1 * noise[poison]
    doubt = expand.testify(strong, labels, trusted, 4, ASKED, HEAD, 0, "x")
    assert doubt[poison].max() < 0.05  # the witnesses have none
    asked = replace(ASKED, subset_share=0.15)
    rounds, _ = expand.expand(strong, labels, trusted, EVERYWHERE, 4, asked, HEAD, 0)
    assert (rounds[labels == 0] > 0).sum() >= 11 and (rounds[poison] > 0).sum() <= 1


# --- the core -----------------------------------------------------------------------------------


def test_only_the_core_and_the_seeds_can_be_in_the_subset(planted):
    features, labels, trusted, _ = planted
    half = torch.rand(400, generator=torch.Generator().manual_seed(2)) < 0.5
    few = half & (torch.arange(400) < 100)

    def grown(core: Tensor, **changes: bool) -> Tensor:
        settings = replace(SETTINGS, **changes)
        return expand.expand(features, labels, trusted, core, 4, settings, HEAD, 0)[0]

    assert torch.equal(grown(half, within_core=False), grow(planted))
    assert (grow(planted) > 0)[~half].any()
    rounds = grown(half)
    assert (rounds >= 0).sum() == 120 and not (rounds > 0)[~half].any()
    # Fewer than the 120 that are asked: all of them at once, without confusion.
    rounds, log = expand.expand(features, labels, trusted, few, 4, SETTINGS, HEAD, 0)
    assert torch.equal(rounds, torch.where(trusted, 0, torch.where(few, 1, -1)))
    assert log == {"trusted_accuracy": []}


def test_poisons_that_confusion_takes_for_clean_stay_outside_with_a_clean_core(planted):
    """The weak trigger: where all of D is the core it enters, where the core is clean it does not."""
    _, labels, trusted, poison = planted
    entered = [
        (expand.expand(weakened(planted), labels, trusted, core, 4, SETTINGS, HEAD, 0)[0] > 0)[poison].sum()
        for core in (EVERYWHERE, ~poison)
    ]
    assert entered[0] > 3 and entered[1] == 0


# --- the clean subset ---------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("wrong_label", ["shifted", "random"])
def test_the_subset_grows_by_rounds_and_takes_no_poison(planted, per_class, wrong_label):
    _, labels, trusted, poison = planted
    rounds = grow(planted, replace(SETTINGS, per_class=per_class, wrong_label=wrong_label))
    assert torch.equal(rounds == 0, trusted)
    # By hand: from 16, add floor(0.08 of the rest), the last time what is missing to 120.
    sizes, size = [16], 16
    while size < 120:
        sizes.append(min(int(0.08 * (400 - size)), 120 - size))
        size += sizes[-1]
    assert rounds[rounds >= 0].bincount().tolist() == sizes
    assert not (rounds[poison] >= 0).any()
    if per_class:
        for number in range(1, len(sizes)):
            shares = labels[rounds == number].bincount(minlength=4)
            candidates = labels[(rounds < 0) | (rounds >= number)].bincount(minlength=4)
            assert ((shares - sizes[number] * candidates / candidates.sum()).abs() < 1).all()


def test_expansion_depends_on_its_seed_alone(planted):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = grow(planted)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(grow(planted), first)
    assert not torch.equal(grow(planted, seed=1), first)


def test_seeds_that_are_enough_are_left_alone(planted):
    rounds = grow(planted, replace(SETTINGS, subset_share=0.04))
    assert torch.equal(rounds, torch.where(planted[2], 0, -1))


def test_the_log_says_what_confusion_left_of_the_trusted_samples(planted):
    features, labels, trusted, _ = planted
    confusions = ({"steps": 0}, {"trust": 0.02, "wrong_label": "random", "steps": 400})
    known = [
        expand.expand(features, labels, trusted, EVERYWHERE, 4, replace(SETTINGS, **changes), HEAD, 0)[1]
        for changes in confusions
    ]
    assert all(set(log) == {"trusted_accuracy"} and log["trusted_accuracy"] for log in known)
    # The classes lie apart, so a head that is not confused names all; a confused one is taught to name none.
    assert min(known[0]["trusted_accuracy"]) > 0.95 and max(known[1]["trusted_accuracy"]) < 0.25
