"""Streams and methods: what a name leads to."""

import numpy as np
import pytest
import torch

from tcore import seeds
from tcore.experiment import registry
from tcore.files import InputError


def test_seeds_are_the_first_63_bits_of_a_sha256():
    # $ printf '0/badnets/selection' | sha256sum
    assert seeds.derive(0, "badnets", "selection") == 0x3C7EE910AE64B3FB >> 1
    assert seeds.derive(7) == 0x7902699BE42C8A8E >> 1  # $ printf 7 | sha256sum


def test_seeds_differ_by_seed_name_and_order_and_suit_torch():
    calls = [(0, "a"), (1, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, "a", 0), (10,), (0,)]
    found = {seeds.derive(*call) for call in calls}
    assert len(found) == len(calls)
    assert all(0 <= seed < 2**63 for seed in found)


def test_generators_repeat_and_leave_the_global_stream_alone():
    state = torch.random.get_rng_state()
    first, again, other = (torch.rand(4, generator=seeds.generator(0, n)) for n in ("a", "a", "b"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_splitmix64_published_values(monkeypatch):
    # The first five outputs for the seed 1234567, as in the reference C program and on Rosetta Code.
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    steps = np.arange(1, 6, dtype=np.uint64) * seeds.GOLDEN
    assert seeds._mix(np.uint64([1234567]) + steps).tolist() == published


def test_uniform_rows_depend_on_their_index_alone():
    index = np.array([5, 0, 2**40, 7])
    found = seeds.uniform(0, "a", index=index, size=1000)
    assert found.shape == (4, 1000) and found.min() >= 0 and found.max() < 1
    assert np.array_equal(found[[2]], seeds.uniform(0, "a", index=index[[2]], size=1000))
    assert np.array_equal(found[:, :10], seeds.uniform(0, "a", index=index, size=10))
    assert np.abs(np.corrcoef(found) - np.eye(4)).max() < 0.1
    for other in (seeds.uniform(1, "a", index=index, size=9), seeds.uniform(0, "b", index=index, size=9)):
        assert not np.isin(other, found).any()
    many = seeds.uniform(0, "a", index=np.arange(20_000), size=3)
    assert np.allclose(np.histogram(many, 10, (0, 1))[0] / 6000, 1, atol=0.06)
    assert np.abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.03  # neighbours


def test_a_file_is_a_method_and_an_underscore_hides_it(tmp_path, monkeypatch):
    (tmp_path / "colours").mkdir()
    for name in ("red", "blue", "_shared", "__init__"):
        (tmp_path / "colours" / f"{name}.py").touch()
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    assert registry.names("colours") == ["blue", "red"]
    assert registry.path("colours", "red") == tmp_path / "colours/red.py"
    with pytest.raises(InputError, match=r"'rde' among colours: did you mean 'red'\? known: blue, red"):
        registry.path("colours", "rde")
    for name in ("_shared", "../colours/red", "", None):
        with pytest.raises(InputError, match="known: blue, red"):
            registry.check("colours", name)


def test_methods_are_loaded_by_name():
    assert registry.load("data/sources", "signs").__name__ == "tcore.data.sources.signs"
    with pytest.raises(InputError, match="did you mean 'badnets'"):
        registry.load("dataset_attacks", "badnet")
