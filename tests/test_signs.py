"""The drawn signs: repeatable, balanced, and as hard as they should be."""

import numpy as np
import pytest

from tcore.data.sources import signs

SETTINGS = signs.Settings(train=300, test=100, image_size=16)


@pytest.fixture(scope="module")
def drawn():
    return signs.load(SETTINGS, {})


def test_both_splits_have_ten_even_classes(drawn):
    for split, n in (("train", 300), ("test", 100)):
        images = drawn[split]
        assert images.pixels.shape == (n, 16, 16, 3) and images.pixels.dtype == np.uint8
        assert np.bincount(images.labels).tolist() == [n // 10] * 10
        assert images.index.tolist() == list(range(n))
        assert len(set(images.class_names)) == 10
        assert (np.diff(images.labels) != 0).mean() > 0.7  # in no order
    assert len(np.unique(drawn["train"].pixels.reshape(300, -1), axis=0)) == 300


def test_drawing_depends_on_its_seed_alone(drawn):
    again = signs.load(SETTINGS, {})
    other = signs.load(signs.Settings(train=300, test=100, image_size=16, seed=1), {})
    for split in ("train", "test"):
        assert np.array_equal(drawn[split].pixels, again[split].pixels)
        assert not np.array_equal(drawn[split].pixels, other[split].pixels)
    assert not np.array_equal(drawn["train"].pixels[:100], drawn["test"].pixels)


def test_another_seed_draws_the_same_classes_anew(drawn):
    """A classifier of mean images carries over from one seed to the next, better than by chance."""
    other = signs.load(signs.Settings(train=300, test=100, image_size=16, seed=1), {})["train"]
    train = drawn["train"]
    means = np.stack([train.pixels[train.labels == k].mean(0).ravel() for k in range(10)])
    distance = np.linalg.norm(other.pixels.reshape(300, 1, -1) - means, axis=2)
    assert (distance.argmin(1) == other.labels).mean() > 0.25


def test_open_images_have_neither_labels_nor_classes():
    images = signs.load(signs.Settings(train=40, test=20, image_size=16, open=True), {})["train"]
    assert images.labels.tolist() == [-1] * 40
    assert images.class_names == () and images.num_classes == 0
    assert len(np.unique(images.pixels.reshape(40, -1), axis=0)) == 40


def test_blocks_join_to_one_set(monkeypatch):
    monkeypatch.setattr(signs, "BLOCK", 32)
    images = signs.load(SETTINGS, {})["test"]
    assert len(images) == 100 and np.bincount(images.labels).tolist() == [10] * 10


@pytest.mark.parametrize("size", [16, 32])
def test_images_fill_the_range_and_are_no_noise(size):
    pixels = signs.load(signs.Settings(train=60, test=10, image_size=size), {})["train"].pixels / 255.0
    assert pixels.min() < 0.05 and pixels.max() > 0.95
    assert 0.3 < pixels.mean() < 0.7
    neighbours = np.abs(np.diff(pixels, axis=1)).mean()
    strangers = np.abs(pixels - np.roll(pixels, size // 2, axis=1)).mean()
    assert neighbours < 0.6 * strangers
