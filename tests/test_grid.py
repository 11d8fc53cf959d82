"""The grid against cells written out by hand."""

import pytest

from tcore.experiment import grid
from tcore.files import InputError

CONFIG = {
    "seeds": [0, 1],
    "pairs": [{"pretrain": "a", "downstream": "b"}, {"pretrain": "c", "downstream": "b"}],
    "scenarios": ["clean", "T1", "T2", "T3", "T1+T2"],
    "encoder_attacks": ["e", "f"],
    "dataset_attacks": ["d", "g", "h"],
    "defenses": ["none", "tcore"],
}


@pytest.mark.parametrize(
    ("attacks", "scenario"),
    [
        (("clean", "clean"), "clean"),
        (("badencoder", "clean"), "T1"),
        (("clean", "badnets"), "T2"),
        (("badencoder", "adaptive"), "T3"),
        (("badencoder", "badnets"), "T1+T2"),
    ],
)
def test_a_scenario_follows_from_two_attacks(attacks, scenario):
    assert grid.scenario(*attacks) == scenario


def test_counts_by_hand():
    # pairs x defences x seeds = 8; attack pairs: 1 clean, 2 T1, 3 T2, 2 T3, 2 * 3 both
    counts = grid.cells(CONFIG)["scenario"].value_counts().to_dict()
    assert counts == {"clean": 8, "T1": 16, "T2": 24, "T3": 16, "T1+T2": 48}


def test_one_scenario_in_full():
    config = CONFIG | {"seeds": [5], "pairs": CONFIG["pairs"][:1], "scenarios": ["T3"]}
    assert grid.cells(config).to_dict("split")["data"] == [
        ["a", "b", "e", "adaptive", "T3", "none", 5],
        ["a", "b", "e", "adaptive", "T3", "tcore", 5],
        ["a", "b", "f", "adaptive", "T3", "none", 5],
        ["a", "b", "f", "adaptive", "T3", "tcore", 5],
    ]


def test_every_scenario_is_what_its_attacks_say():
    for name in grid.SCENARIOS:
        assert set(grid.cells(CONFIG | {"scenarios": [name]})["scenario"]) == {name}


def test_cells_are_computed_once():
    twice = CONFIG | {"scenarios": ["T1", "T1"], "seeds": [0, 0]}
    once = CONFIG | {"scenarios": ["T1"], "seeds": [0]}
    assert grid.cells(twice).equals(grid.cells(once))


def test_only_an_attack_that_is_told_of_the_encoder_needs_a_set_for_each():
    for name in ("badnets", "badnets_10", "adap_blend_10", "clean"):
        assert grid.received("a", "e", "b", name, 0) == f"poisoned/any/b-{name}/0"
        assert grid.received("c", "clean", "b", name, 0) == f"poisoned/any/b-{name}/0"
    for name in ("adaptive", "tis_aware", "tis_aware_16"):
        assert grid.received("a", "e", "b", name, 0) == f"poisoned/a-e/b-{name}/0"
    assert grid.received("a", grid.RECEIVED, "b", grid.RECEIVED, 0) == "datasets/b"


def test_a_variant_of_an_attack_makes_the_attacks_scenario():
    assert grid.scenario("clean", "sig_10") == "T2" and grid.scenario("badencoder", "sig_10") == "T1+T2"


def test_a_cell_is_known_by_its_name():
    found = grid.victim("cifar10_file-drupe/gtsrb_file-adap_blend/7")
    assert found == {
        "pretrain": "cifar10_file",
        "encoder_attack": "drupe",
        "downstream": "gtsrb_file",
        "dataset_attack": "adap_blend",
        "seed": "7",
    }
    with pytest.raises(InputError, match="should be <pretrain>-<attack>/"):
        grid.victim("cifar10/gtsrb/7")
