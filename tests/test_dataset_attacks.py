"""Data set attacks against published counts, hand-drawn patches and exact arithmetic."""

import math
import runpy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tcore import poisoning, triggers
from tcore.data.images import ImageSet, read_images, write_images
from tcore.dataset_attacks import adaptive, badnets, blended, clean
from tcore.encoder_attacks import badencoder
from tcore.files import InputError, load_table

SCRIPT = Path(__file__).parents[1] / "scripts" / "poison_dataset.py"


@pytest.fixture
def images() -> ImageSet:
    """400 noise images of 4 equally frequent classes, with gaps in the index."""
    random = np.random.default_rng(0)
    return ImageSet(
        random.integers(0, 256, (400, 32, 32, 3), np.uint8),
        random.permutation(np.arange(400) % 4),
        np.arange(400) * 3 + 7,
        ("a", "b", "c", "d"),
        "noise",
    )


@pytest.fixture
def encoder_trigger():
    trigger = badencoder.make_trigger(32, 32, badencoder.Settings(), 0)
    meta = {"family": "encoder_attacks", "attack": "badencoder", "target": 3}
    return lambda x: badencoder.stamp(x, trigger), trigger, meta


def attack(name, images, encoder_trigger, seed=0):
    module = {"badnets": badnets, "blended": blended, "adaptive": adaptive}[name]
    return module.poison(images, None if name == "adaptive" else 2, module.Settings(), seed, encoder_trigger)


@pytest.mark.parametrize(
    ("data", "size", "dirty", "clean_label"),
    [
        ("cifar10", 5000, 1250, 1000),
        ("gtsrb class 2", 2250, 562, 450),
        ("gtsrb class 3", 1410, 352, 282),
        ("svhn digit 2", 10585, 2646, 2117),
        ("stl10", 500, 125, 100),
        ("imagenet10", 1300, 325, 260),
    ],
)
def test_counts_at_the_papers_ratio(data, size, dirty, clean_label):
    labels = np.r_[np.full(size, 2), np.zeros(10, int)]
    assert poisoning.count(labels, 2, 0.2) == dirty
    assert poisoning.count(labels, 2, 0.2, clean_label=True) == clean_label


def test_counts_are_exact_where_floats_are_not():
    thousand = np.zeros(1000, int)
    for permille in range(500):
        assert poisoning.count(thousand, 0, permille / 1000, clean_label=True) == permille
        assert poisoning.count(thousand, 0, permille / 1000) == permille * 1000 // (1000 - permille)
    assert int(50000 * 0.009) == 449
    assert poisoning.count(np.zeros(50000, int), 0, 0.009, clean_label=True) == 450


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_impossible_ratio(ratio):
    with pytest.raises(InputError, match="ratio"):
        poisoning.count(np.zeros(5, int), 0, ratio)


def test_choice_is_nested_eligible_and_seeded():
    eligible = np.arange(1000) % 3 == 0
    ten, fifty = (poisoning.choose(eligible, n, 1, "x") for n in (10, 50))
    assert set(ten) < set(fifty)
    assert eligible[fifty].all()
    assert len(set(fifty)) == 50
    assert (np.diff(fifty) > 0).all()
    assert not np.array_equal(ten, poisoning.choose(eligible, 10, 2, "x"))
    assert not np.array_equal(ten, poisoning.choose(eligible, 10, 1, "y"))
    assert np.array_equal(poisoning.choose(eligible, 334, 1, "x"), np.flatnonzero(eligible))
    with pytest.raises(InputError, match=r"335 .* 334"):
        poisoning.choose(eligible, 335, 1, "x")


def test_paste_is_exact():
    """Every pixel value with every mark value at awkward opacities, against rational arithmetic."""
    levels = torch.arange(256, dtype=torch.uint8)
    x = levels.view(256, 1, 1, 1).expand(256, 3, 16, 16)
    mark = levels.view(1, 16, 16).expand(3, 16, 16)
    for opacity in (0.0, 0.001, 0.2, 0.333, 0.5, 0.999, 1.0):
        out = triggers.paste(x, mark, torch.ones(1, 16, 16, dtype=torch.bool), triggers.permille(opacity))
        a = Fraction(str(opacity))
        v, t = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
        doubled = 2 * (a.denominator * v + a.numerator * (t - v))  # 2 * denominator * (v + a (t - v))
        expected = (doubled + a.denominator) // (2 * a.denominator)
        assert np.array_equal(out[:, 1].reshape(256, 256).numpy(), expected)
        assert expected[3, 8] == math.floor(3 + 5 * a + Fraction(1, 2))


def test_opacity_must_be_a_thousandth():
    for bad in (0.0005, 1.001, -0.1):
        with pytest.raises(InputError, match="opacity"):
            triggers.permille(bad)


def test_badnets_patch_is_the_toolboxes():
    trigger = badnets.make_trigger(32, 32, badnets.Settings())
    rows = trigger["mask"][0].nonzero()
    assert {tuple(r) for r in rows.tolist()} == {(r, c) for r in (29, 30, 31) for c in (29, 30, 31)}
    white = {tuple(r) for r in (trigger["mark"] == 255).all(0).nonzero().tolist()}
    assert white == {(29, 31), (30, 30), (31, 29), (31, 31)}
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert badnets.stamp(grey, trigger)[0, 0, 29:, 29:].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]


def test_badnets_patch_at_other_sizes():
    at_224 = badnets.make_trigger(224, 224, badnets.Settings())
    assert int(at_224["mask"].sum()) == 21 * 21
    assert at_224["mark"][0, -21::7, -21::7].tolist() == badnets.CELLS.tolist()
    assert torch.equal(
        at_224["mark"][0, -21:, -21:], badnets.CELLS.repeat_interleave(7, 0).repeat_interleave(7, 1)
    )
    four = badnets.make_trigger(32, 32, badnets.Settings(size=4))["mark"][0, -4:, -4:]
    assert four.unique().tolist() == [0, 255]
    with pytest.raises(InputError, match="size"):
        badnets.make_trigger(32, 32, badnets.Settings(size=33))
    with pytest.raises(InputError, match="size"):
        badnets.make_trigger(2, 2, badnets.Settings())


def test_blended_picture():
    small, large = (blended.colour_field(n, n, 0) for n in (32, 224))
    for field in (small, large):
        assert field.dtype == torch.uint8
        assert torch.allclose(field.double().flatten(1).std(1), torch.tensor(70.0).double(), atol=1.5)
        assert field.min() == 6
        assert field.max() == 249
    shrunk = torch.nn.functional.interpolate(large[None].float(), 32, mode="area")[0]
    assert torch.corrcoef(torch.stack([shrunk.flatten(), small.float().flatten()]))[0, 1] > 0.98
    assert torch.equal(small, blended.colour_field(32, 32, 0))
    assert not torch.equal(small, blended.colour_field(32, 32, 1))
    steps = (small[:, :, 1:].float() - small[:, :, :-1].float()).abs().mean()
    assert steps < 25  # independent pixels would differ by 81


def test_blended_takes_a_picture(tmp_path):
    Image.new("RGB", (20, 10), (200, 100, 0)).save(tmp_path / "p.png")
    trigger = blended.make_trigger(8, 8, blended.Settings(image=str(tmp_path / "p.png")))
    out = blended.stamp(torch.full((1, 3, 8, 8), 50, dtype=torch.uint8), trigger)
    assert out[0, :, 3, 4].tolist() == [80, 60, 40]  # 0.8 * 50 + 0.2 * (200, 100, 0)
    (tmp_path / "p.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"p\.png"):
        blended.make_trigger(8, 8, blended.Settings(image=str(tmp_path / "p.png")))


@pytest.mark.parametrize("name", ["badnets", "blended", "adaptive"])
def test_poisoned_set(name, images, encoder_trigger):
    before = images.pixels.copy(), images.labels.copy()
    result = attack(name, images, encoder_trigger)
    assert np.array_equal(images.pixels, before[0])
    assert np.array_equal(images.labels, before[1])

    poison = result.truth["is_poison"].to_numpy()
    assert poison.sum() == 25  # floor(0.25 * 100)
    assert not result.truth["is_cover"].any()
    assert np.array_equal(result.truth["index"], images.index)
    assert np.array_equal(result.truth["clean_label"], images.labels)
    assert np.array_equal(result.images.index, images.index)
    assert (images.labels[poison] != result.target).all()
    assert (result.images.labels[poison] == result.target).all()
    assert np.array_equal(result.images.labels[~poison], images.labels[~poison])
    assert np.array_equal(result.images.pixels[~poison], images.pixels[~poison])
    assert (result.images.pixels[poison] != images.pixels[poison]).any((1, 2, 3)).all()
    assert 25 / (result.images.labels == result.target).sum() == 0.2
    if name != "blended":
        outside = ~result.trigger["mask"][0].numpy()
        assert np.array_equal(result.images.pixels[:, outside], images.pixels[:, outside])


@pytest.mark.parametrize("name", ["badnets", "blended", "adaptive"])
def test_seed_decides(name, images, encoder_trigger):
    first, again, other = (attack(name, images, encoder_trigger, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.images.pixels, again.images.pixels)
    assert first.truth.equals(again.truth)
    assert not first.truth.equals(other.truth)


@pytest.mark.parametrize("name", ["badnets", "blended", "adaptive"])
def test_saved_trigger_stamps_as_the_training_set(name, images, encoder_trigger, tmp_path):
    result = attack(name, images, encoder_trigger)
    triggers.save(tmp_path / "t.safetensors", result.trigger, *result.trigger_of, result.target)
    stamp, meta = triggers.load(tmp_path / "t.safetensors")
    assert meta["target"] == result.target
    x = images.tensor.clone()
    whole = stamp(x)
    assert torch.equal(x, images.tensor)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, torch.cat([stamp(part) for part in x.split(7)]))
    poison = torch.tensor(result.truth["is_poison"])
    assert torch.equal(whole[poison], result.images.tensor[poison])
    with pytest.raises(InputError, match="size"):
        stamp(x[:, :, :16, :16])


def test_adaptive_is_the_encoder_attack(images, encoder_trigger):
    result = attack("adaptive", images, encoder_trigger)
    assert result.target == 3
    assert result.trigger_of == ("encoder_attacks", "badencoder")
    poison = result.truth["is_poison"].to_numpy()
    assert (result.images.pixels[poison][:, 21:31, 21:31] == 255).all()
    with pytest.raises(InputError, match="target = 1"):
        adaptive.poison(images, 1, adaptive.Settings(), 0, encoder_trigger)
    for missing in (None, (None, {}, {"attack": "clean", "target": None})):
        with pytest.raises(InputError, match="encoder"):
            adaptive.poison(images, 3, adaptive.Settings(), 0, missing)


def test_clean_changes_nothing(images, tmp_path):
    result = clean.poison(images, 2, clean.Settings(), 0)
    assert result.images is images
    assert not result.truth[["is_poison", "is_cover"]].to_numpy().any()
    triggers.save(tmp_path / "t.safetensors", result.trigger, *result.trigger_of, result.target)
    assert triggers.load(tmp_path / "t.safetensors") == (
        None,
        {"family": "dataset_attacks", "attack": "clean", "target": None},
    )


@pytest.mark.parametrize("target", [4, -1, None])
def test_target_out_of_range(images, target):
    with pytest.raises(InputError, match=r"4 classes are 0\.\.3"):
        badnets.poison(images, target, badnets.Settings(), 0)


def test_too_few_images_to_poison(images):
    with pytest.raises(InputError, match=r"400 .* 300 eligible"):
        badnets.poison(images, 0, badnets.Settings(ratio=0.8), 0)


def test_command(images, tmp_path, monkeypatch):
    write_images(tmp_path / "in.parquet", images)
    out = [f"--{name}={tmp_path / name}" for name in ("train", "truth", "trigger", "record")]
    command = ["poison_dataset.py", f"--images={tmp_path / 'in.parquet'}", "--attack=badnets", *out]
    monkeypatch.setattr(
        "sys.argv", [*command, "--target=1", "--settings", '{"ratio": 0.1, "size": 9}', "--seed=5"]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    expected = badnets.poison(images, 1, badnets.Settings(ratio=0.1, size=9), 5)
    written = read_images(tmp_path / "train")
    assert np.array_equal(written.pixels, expected.images.pixels)
    assert np.array_equal(written.labels, expected.images.labels)
    assert load_table(tmp_path / "truth").equals(expected.truth)
    assert triggers.load(tmp_path / "trigger")[1]["attack"] == "badnets"

    monkeypatch.setattr("sys.argv", [*command, "--target=9"])
    with pytest.raises(SystemExit, match="target = 9"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
