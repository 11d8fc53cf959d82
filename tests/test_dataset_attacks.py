"""Data set attacks against published counts, hand-drawn patches and exact arithmetic."""

import math
import runpy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tcore import seeds
from tcore.data.images import ImageSet, read_images, write_images
from tcore.dataset_attacks import adap_blend, adap_patch, adaptive, badnets, blended, clean, sig, tact, wanet
from tcore.encoder_attacks import badencoder
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.files import InputError, load_table
from tcore.poisoning import marks, poisoned, triggers

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "poison_dataset.py"


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


FOUR = {"tact": {"sources": [1, 3], "cover_classes": [0]}}  # settings that suit four classes
ALL = ["badnets", "blended", "sig", "wanet", "tact", "adap_blend", "adap_patch", "adaptive"]
COVERED = ("wanet", "tact", "adap_blend", "adap_patch")
LIKE_TEST = ("badnets", "blended", "sig", "tact", "adaptive", "wanet")  # poisons carry the test trigger


def attack(name, images, encoder_trigger=None, seed=0, **settings):
    module = registry.load("dataset_attacks", name)
    settings = module.Settings(**FOUR.get(name, {}) | settings)
    known = {"encoder_trigger": encoder_trigger} if name == "adaptive" else {}
    return module.poison(images, None if name == "adaptive" else 2, settings, seed, **known)


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
    assert poisoned.count(labels, 2, 0.2) == dirty
    assert poisoned.count(labels, 2, 0.2, clean_label=True) == clean_label


def test_counts_are_exact_where_floats_are_not():
    thousand = np.zeros(1000, int)
    for permille in range(500):
        assert poisoned.count(thousand, 0, permille / 1000, clean_label=True) == permille
        assert poisoned.count(thousand, 0, permille / 1000) == permille * 1000 // (1000 - permille)
    assert int(50000 * 0.009) == 449
    assert poisoned.count(np.zeros(50000, int), 0, 0.009, clean_label=True) == 450


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_impossible_ratio(ratio):
    with pytest.raises(InputError, match="ratio"):
        poisoned.count(np.zeros(5, int), 0, ratio)


def test_choice_is_nested_eligible_and_seeded():
    eligible = np.arange(1000) % 3 == 0
    ten, fifty = (poisoned.choose(eligible, n, 1, "x") for n in (10, 50))
    assert set(ten) < set(fifty)
    assert eligible[fifty].all()
    assert len(set(fifty)) == 50
    assert (np.diff(fifty) > 0).all()
    assert not np.array_equal(ten, poisoned.choose(eligible, 10, 2, "x"))
    assert not np.array_equal(ten, poisoned.choose(eligible, 10, 1, "y"))
    assert np.array_equal(poisoned.choose(eligible, 334, 1, "x"), np.flatnonzero(eligible))
    with pytest.raises(InputError, match=r"335 .* 334"):
        poisoned.choose(eligible, 335, 1, "x")


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
    small, large = (marks.colour_field(n, n, 0) for n in (32, 224))
    for field in (small, large):
        assert field.dtype == torch.uint8
        assert torch.allclose(field.double().flatten(1).std(1), torch.tensor(70.0).double(), atol=1.5)
        assert field.min() == 6
        assert field.max() == 249
    shrunk = torch.nn.functional.interpolate(large[None].float(), 32, mode="area")[0]
    assert torch.corrcoef(torch.stack([shrunk.flatten(), small.float().flatten()]))[0, 1] > 0.98
    assert torch.equal(small, marks.colour_field(32, 32, 0))
    assert not torch.equal(small, marks.colour_field(32, 32, 1))
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


@pytest.mark.parametrize("name", ALL)
def test_poisoned_set(name, images, encoder_trigger):
    before = images.pixels.copy(), images.labels.copy()
    result = attack(name, images, encoder_trigger)
    assert np.array_equal(images.pixels, before[0])
    assert np.array_equal(images.labels, before[1])

    poison, cover = (result.truth[flag].to_numpy() for flag in ("is_poison", "is_cover"))
    assert poison.sum() == (20 if name == "sig" else 25)  # floor(0.2 * 100), floor(0.25 * 100)
    assert cover.sum() == (6 if name in COVERED else 0)  # floor(25 / 4)
    assert not (poison & cover).any()
    assert np.array_equal(result.truth["index"], images.index)
    assert np.array_equal(result.truth["clean_label"], images.labels)
    assert np.array_equal(result.images.index, images.index)
    assert (result.images.labels[poison] == result.target).all()
    assert np.array_equal(result.images.labels[~poison], images.labels[~poison])
    touched = poison | cover
    assert np.array_equal(result.images.pixels[~touched], images.pixels[~touched])
    assert (result.images.pixels[touched] != images.pixels[touched]).any((1, 2, 3)).all()
    if name == "sig":
        assert (images.labels[poison] == result.target).all()
    else:
        assert (images.labels[poison] != result.target).all()
        assert 25 / (result.images.labels == result.target).sum() == 0.2
    if name in ("badnets", "tact", "adaptive"):
        outside = ~result.trigger["mask"][0].numpy()
        assert np.array_equal(result.images.pixels[:, outside], images.pixels[:, outside])


@pytest.mark.parametrize("name", ALL)
def test_seed_decides(name, images, encoder_trigger):
    first, again, other = (attack(name, images, encoder_trigger, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.images.pixels, again.images.pixels)
    assert first.truth.equals(again.truth)
    assert not first.truth.equals(other.truth)


@pytest.mark.parametrize("name", ALL)
def test_blocks_do_not_matter(name, images, encoder_trigger, monkeypatch):
    whole = attack(name, images, encoder_trigger)
    monkeypatch.setattr(triggers, "BLOCK", 3 * 3 * 32 * 32)
    assert triggers.rows_at_once(images.tensor) == 3
    assert np.array_equal(whole.images.pixels, attack(name, images, encoder_trigger).images.pixels)


@pytest.mark.parametrize("name", ALL)
def test_other_images_do_not_matter(name, images, encoder_trigger):
    """Which rows, and what happens to each, follows from labels and index, not from pixels elsewhere."""
    result = attack(name, images, encoder_trigger)
    touched = np.flatnonzero(result.truth["is_poison"] | result.truth["is_cover"])
    keep = touched[: len(touched) // 2]
    pixels = 255 - images.pixels
    pixels[keep] = images.pixels[keep]
    other = attack(name, replace(images, pixels=pixels), encoder_trigger)
    assert other.truth.equals(result.truth)
    assert np.array_equal(other.images.pixels[keep], result.images.pixels[keep])


@pytest.mark.parametrize("name", ALL)
def test_saved_trigger_stamps_any_image(name, images, encoder_trigger, tmp_path, monkeypatch):
    result = attack(name, images, encoder_trigger)
    file = tmp_path / "t.safetensors"
    triggers.save(file, result.trigger, *result.trigger_of, result.target, result.goals)
    stamp, meta = triggers.load(file)
    assert meta["target"] == result.target
    assert tuple(meta.get("goals", ())) == (result.goals or ())
    x = images.tensor.clone()
    whole = stamp(x)
    assert torch.equal(x, images.tensor)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, torch.cat([stamp(part) for part in x.split(7)]))
    assert torch.equal(whole, stamp(x.flip(0)).flip(0))
    assert stamp(x[:0]).shape == (0, 3, 32, 32)
    monkeypatch.setattr(triggers, "BLOCK", 1)
    assert torch.equal(whole, stamp(x))
    poison = torch.tensor(result.truth["is_poison"])
    assert torch.equal(whole[poison], result.images.tensor[poison]) == (name in LIKE_TEST)
    with pytest.raises(InputError, match="size"):
        stamp(x[:, :, :16, :16])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ALL)
def test_devices_agree(name, images, encoder_trigger):
    result = attack(name, images, encoder_trigger)
    stamp = registry.load(*result.trigger_of).stamp
    on_gpu = stamp(images.tensor.cuda(), result.trigger).cpu()
    assert torch.equal(on_gpu, stamp(images.tensor, result.trigger))


# Counts


def labelled(*sizes: int) -> ImageSet:
    """Classes of these sizes, grey images of 4x4 pixels."""
    labels, names = np.repeat(np.arange(len(sizes)), sizes), tuple(map(str, range(len(sizes))))
    pixels = np.full((len(labels), 4, 4, 3), 128, np.uint8)
    return ImageSet(pixels, labels, np.arange(len(labels)), names, "sizes")


GTSRB = (
    210, 2220, 2250, 1410, 1980, 1860, 420, 1440, 1410, 1470, 2010, 1320, 2100, 2160, 780, 630, 420, 1110,
    1200, 210, 360, 330, 390, 510, 270, 1500, 600, 240, 540, 270, 450, 780, 240, 689, 420, 1200, 390, 210,
    2070, 300, 360, 240, 240,
)  # fmt: skip
SVHN = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
PAPER = {  # class sizes of the training sets; poisons of dirty-label attacks, of SIG, of TaCT
    "cifar10": ((5000,) * 10, 1250, 1000, 1250),
    "stl10": ((500,) * 10, 125, 100, 125),
    "gtsrb": (GTSRB, 562, 450, 352),
    "svhn": (SVHN, 2646, 2117, 2646),
}

COVERS = {1250: 312, 125: 31, 562: 140, 352: 88, 2646: 661}


@pytest.mark.parametrize("data", PAPER)
@pytest.mark.parametrize("name", [name for name in ALL if name != "adaptive"])
def test_the_papers_counts_with_the_papers_classes(data, name):
    """config/paper.yaml on sets with the real class sizes."""
    sizes, dirty, clean_label, for_tact = PAPER[data]
    images = labelled(*sizes)
    assert len(images) == {"cifar10": 50_000, "stl10": 5_000, "gtsrb": 39_209, "svhn": 73_257}[data]
    entry = yaml.safe_load((ROOT / "config/paper.yaml").read_text())["datasets"][data]
    module = registry.load("dataset_attacks", name)
    settings = module.Settings(**resolve(name, entry["attacks"].get(name, {})))
    truth = module.poison(images, entry["dataset_target"], settings, 0).truth
    n = {"sig": clean_label, "tact": for_tact}.get(name, dirty)
    assert truth["is_poison"].sum() == n
    assert truth["is_cover"].sum() == (COVERS[n] if name in COVERED else 0)


def test_count_said_in_three_ways(images):
    assert attack("badnets", images, ratio=None, rate=0.0325).truth.is_poison.sum() == 13
    assert attack("badnets", images, ratio=None, poisons=7).truth.is_poison.sum() == 7
    assert attack("sig", images, ratio=None, rate=0.0325).truth.is_poison.sum() == 13
    nobody = attack("wanet", images, ratio=None, poisons=0)
    assert np.array_equal(nobody.images.pixels, images.pixels)
    for wrong, message in (
        ({"rate": 0.1}, r"ratio = 0.2 and rate = 0.1: .*set one of them"),
        ({"poisons": 3}, "ratio = 0.2 and poisons = 3"),
        ({"ratio": None, "rate": 0.1, "poisons": 3}, "rate = 0.1 and poisons = 3"),
        ({"ratio": None}, "none is given"),
        ({"ratio": None, "poisons": -1}, "poisons = -1"),
        ({"ratio": None, "rate": 1.5}, "rate = 1.5"),
        ({"ratio": None, "poisons": 301}, "301 .* 300 eligible"),
    ):
        for name in ("badnets", "adap_patch"):
            with pytest.raises(InputError, match=message):
                attack(name, images, **wrong)


def test_covers_are_a_share_of_the_poisons(images):
    for cover, n in ((0, 0), (0.25, 6), (0.3, 7), (1, 25), (2, 50)):
        assert attack("adap_blend", images, cover=cover).truth.is_cover.sum() == n
    with pytest.raises(InputError, match=r"cover = -0.1"):
        attack("wanet", images, cover=-0.1)
    with pytest.raises(InputError, match=r"adap_patch/covers but 375 eligible"):
        attack("adap_patch", images, cover=100)


def test_sig_beyond_its_class(images):
    with pytest.raises(InputError, match=r"101 images to choose for .*sig/poisons but 100 eligible"):
        attack("sig", images, ratio=None, poisons=101)
    assert attack("sig", images, ratio=None, poisons=100).truth.is_poison.sum() == 100


# Pixels, against the formulas in NumPy and float64

SIZES = [(32, 32), (33, 47), (5, 8), (224, 224)]


def some(height: int, width: int, n: int = 6) -> np.ndarray:
    """(n, 3, H, W) uint8 noise with both extremes in it."""
    x = np.random.default_rng(height).integers(0, 256, (n, 3, height, width), np.uint8)
    x[0, :, 0], x[0, :, 1] = 0, 255
    return x


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("delta", "frequency"), [(30, 6), (40, 6), (12.5, 3.3)])
def test_sig_is_its_formula(height, width, delta, frequency):
    trigger = sig.make_trigger(height, width, sig.Settings(delta=delta, frequency=frequency))
    x = some(height, width)
    v = delta * np.sin(2 * np.pi * np.arange(width) * frequency / width)
    expected = np.floor(np.clip(x + np.round(v, 9), 0, 255) + 0.5)
    assert np.array_equal(sig.stamp(torch.from_numpy(x), trigger).numpy(), expected)


def test_sig_published_wave():
    wave = sig.make_trigger(32, 32, sig.Settings())["wave"]
    assert wave[1, 5, :9].tolist() == [0, 28, 21, -11, -30, -11, 21, 28, 0]  # 27.72, 21.21, -11.48


def cubic_matrix(points: int, side: int) -> np.ndarray:
    """(side, points): cubic convolution with a = -0.75, corners aligned, edges repeated."""
    a, matrix = -0.75, np.zeros((side, points))
    for row in range(side):
        place = row * (points - 1) / (side - 1)
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            t = abs(place - tap)
            weight = ((a + 2) * t - (a + 3)) * t * t + 1 if t <= 1 else ((t - 5) * t + 8) * a * t - 4 * a
            matrix[row, min(max(tap, 0), points - 1)] += weight
    return matrix


def bilinear(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """x (3, H, W) at real places, in float64."""
    low, left = (np.minimum(p.astype(int), n - 2) for p, n in ((rows, x.shape[1]), (columns, x.shape[2])))
    down, across = rows - low, columns - left
    x = x.astype(float)
    top = x[:, low, left] * (1 - across) + x[:, low, left + 1] * across
    return top * (1 - down) + (x[:, low + 1, left] * (1 - across) + x[:, low + 1, left + 1] * across) * down


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("points", "strength"), [(4, 0.5), (5, 1.0), (2, 40.0)])
def test_wanet_is_its_formula(height, width, points, strength):
    settings = wanet.Settings(points=points, strength=strength)
    places = wanet.make_trigger(height, width, settings, 3)["places"]
    generator = seeds.generator(3, "wanet", "field")
    field = 2 * torch.rand((1, 2, points, points), generator=generator, dtype=torch.float64).numpy()[0] - 1
    field /= np.abs(field).mean()
    field = cubic_matrix(points, height) @ field @ cubic_matrix(points, width).T  # (2, H, W): x, y
    columns = np.clip(np.linspace(-1, 1, width)[None] + strength * field[0] / width, -1, 1)
    rows = np.clip(np.linspace(-1, 1, height)[:, None] + strength * field[1] / height, -1, 1)
    rows, columns = (rows + 1) / 2 * (height - 1), (columns + 1) / 2 * (width - 1)
    assert np.abs(places.numpy() / 65536 - np.stack([rows, columns])).max() < 1e-5

    x = some(height, width)
    out = wanet.stamp(torch.from_numpy(x), {"places": places}).numpy()
    exact = np.stack([bilinear(image, rows, columns) for image in x])
    assert np.abs(out - exact).max() < 0.51  # half a level of rounding and the places' grid
    grid = torch.from_numpy(np.stack([columns / (width - 1), rows / (height - 1)], -1) * 2 - 1)[None]
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(x).double(), grid.expand(len(x), -1, -1, -1), align_corners=True
    )
    assert (torch.from_numpy(out) - (sampled + 0.5).floor()).abs().double().mean() < 2e-3


def test_wanet_moves_by_a_fifth_of_a_pixel():
    moves = []
    for seed in range(50):
        places = wanet.make_trigger(32, 32, wanet.Settings(), seed)["places"].numpy() / 65536
        moves.append(np.abs(places - np.indices((32, 32))))
    assert 0.15 < np.mean(moves) < 0.25
    assert (
        wanet.make_trigger(32, 32, wanet.Settings(strength=0), 0)["places"].tolist()
        == (np.indices((32, 32)) * 65536).tolist()
    )


def test_wanet_covers_have_jitter_of_their_own(images):
    result = attack("wanet", images, cover=2)
    cover = np.flatnonzero(result.truth["is_cover"])
    places = wanet.jitter(result.trigger["places"], images.index[cover], 0).numpy() / 65536
    shift = places - result.trigger["places"].numpy() / 65536
    inside = (places > 0) & (places < 31)
    assert np.abs(shift).max() <= 31 / 64 + 1e-4  # U[-1, 1] / 32 of a grid 2 wide, in pixels
    assert np.abs(shift[inside].mean()) < 0.01
    assert shift[inside].std() == pytest.approx(31 / 64 / 3**0.5, rel=0.02)
    assert places.min() >= 0 and places.max() <= 31
    correlation = np.corrcoef(shift.reshape(len(cover), -1))
    assert np.abs(correlation - np.eye(len(cover))).max() < 0.15
    for row, place in zip(cover[:5], places[:5], strict=True):
        exact = bilinear(images.pixels[row].transpose(2, 0, 1), *place)
        assert np.abs(result.images.pixels[row].transpose(2, 0, 1) - exact).max() < 0.51


def test_wanet_weights_are_exact_at_the_edges():
    """A place on the last row and column, and places on whole and half pixels."""
    x = torch.tensor([[[[0, 100], [200, 255]]]], dtype=torch.uint8).expand(1, 3, 2, 2)
    half = 65536 // 2
    for place, expected in {
        (0, 0): 0, (65536, 65536): 255, (0, 65536): 100, (half, 0): 100, (0, half): 50, (half, half): 139,
        (65535, 65536): 255, (1, 0): 0,
    }.items():  # fmt: skip
        places = torch.tensor(place, dtype=torch.int32).view(1, 2, 1, 1).expand(1, 2, 2, 2)
        assert (wanet.warp(x, places) == expected).all(), place


def blend(x: np.ndarray, t: np.ndarray, alpha: str) -> np.ndarray:
    a = Fraction(alpha)
    doubled = 2 * (a.denominator * x.astype(int) + a.numerator * (t.astype(int) - x.astype(int)))
    return (doubled + a.denominator) // (2 * a.denominator)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_adap_blend_shows_half_of_the_blocks(height, width):
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (60, height, width, 3), np.uint8)
    images = ImageSet(pixels, np.arange(60) % 4, np.arange(60) + 1000, tuple("abcd"), "noise")
    settings = adap_blend.Settings(cover=1)
    result = adap_blend.poison(images, 2, settings, 0)
    mark = marks.colour_field(height, width, 0).permute(1, 2, 0).numpy()
    full = blend(pixels, mark, "3/20")
    row, column = (np.arange(n) * 4 // n for n in (height, width))
    patterns = set()
    for i in np.flatnonzero(result.truth["is_poison"] | result.truth["is_cover"]):
        shown = set()
        for block in range(16):
            inside = (row[:, None] == block // 4) & (column[None] == block % 4)
            got = result.images.pixels[i][inside]
            if not np.array_equal(got, pixels[i][inside]):
                assert np.array_equal(got, full[i][inside])
                shown.add(block)
        assert len(shown) == 8
        patterns.add(frozenset(shown))
    assert len(patterns) > 5
    tested = adap_blend.stamp(images.tensor, result.trigger).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(tested, blend(pixels, mark, "1/5"))


def test_adap_blend_blocks_are_uniform():
    shown = adap_blend.masks(4, 4, np.arange(20_000), adap_blend.Settings(), 0).flatten(1)
    assert (shown.sum(1) == 8).all()
    assert (shown.double().mean(0) - 0.5).abs().max() < 0.02
    pairs = shown.double().T @ shown.double() / len(shown)  # two given blocks: 8/16 * 7/15
    off = pairs[~torch.eye(16, dtype=torch.bool)]
    assert (off - 7 / 30).abs().max() < 0.02
    some_rows = np.array([3, 17, 4])
    again = adap_blend.masks(4, 4, some_rows, adap_blend.Settings(), 0).flatten(1)
    assert torch.equal(again, shown[some_rows])
    for wrong in ({"blocks": 5}, {"blocks": 0}, {"visible": 17}):
        with pytest.raises(InputError, match="blocks"):
            adap_blend.masks(4, 4, some_rows, adap_blend.Settings(**wrong), 0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_adap_patch_deals_four_marks_and_tests_with_two(height, width):
    random = np.random.default_rng(2)
    pixels = random.integers(0, 256, (80, height, width, 3), np.uint8)
    images = ImageSet(pixels, np.arange(80) % 4, np.arange(80), tuple("abcd"), "noise")
    result = adap_patch.poison(images, 2, adap_patch.Settings(cover=2), 0)
    expected = []
    for name, alpha in (("block", "1/2"), ("disc", "1/5"), ("checkers", "1/2"), ("square", "3/10")):
        mark, mask = (t.permute(1, 2, 0).numpy() for t in marks.mark(name, height, width))
        expected.append(np.where(mask, blend(pixels, mark, alpha), pixels))
    for part, n in (("is_poison", 5), ("is_cover", 10)):
        rows = np.flatnonzero(result.truth[part])
        assert len(rows) == n
        kinds = [
            [kind for kind in range(4) if np.array_equal(result.images.pixels[i], expected[kind][i])]
            for i in rows
        ]
        assert all(len(found) == 1 for found in kinds)
        amounts = np.bincount(np.concatenate(kinds), minlength=4)
        assert amounts.max() - amounts.min() <= 1
    tested = adap_patch.stamp(images.tensor, result.trigger).permute(0, 2, 3, 1).numpy()
    by_hand = pixels.copy()
    for name in ("blocks", "checkers"):
        mark, mask = (t.permute(1, 2, 0).numpy() for t in marks.mark(name, height, width))
        by_hand = np.where(mask, mark, by_hand)
    assert np.array_equal(tested, by_hand)


def test_adap_patch_marks_do_not_follow_the_rows():
    dealt = adap_patch.deal(np.arange(4000), 4, 0, "poisons")
    assert np.bincount(dealt).tolist() == [1000] * 4
    halves = np.bincount(dealt[:2000], minlength=4)
    assert (np.abs(halves - 500) < 60).all()
    order = np.random.default_rng(0).permutation(4000)
    assert np.array_equal(adap_patch.deal(order, 4, 0, "poisons"), dealt[order])
    assert adap_patch.deal(np.arange(0), 4, 0, "covers").tolist() == []
    # as backdoor-toolbox splits 150 poisons
    assert np.bincount(adap_patch.deal(np.arange(150), 4, 0, "poisons")).tolist() == [38, 37, 38, 37]


def test_adap_patch_wants_an_opacity_for_every_mark(images):
    with pytest.raises(InputError, match="2 marks and 4 opacities"):
        attack("adap_patch", images, marks=("block", "disc"))
    with pytest.raises(InputError, match="test_marks"):
        attack("adap_patch", images, test_marks=())


# TaCT and all-to-all: who becomes what


def test_tact_takes_sources_and_covers_from_their_classes(images):
    result = attack("tact", images, cover=1)
    poison, cover = (result.truth[flag].to_numpy() for flag in ("is_poison", "is_cover"))
    assert set(images.labels[poison]) == {1, 3}
    assert set(images.labels[cover]) == {0}
    assert result.goals == (-1, 2, -1, 2)
    stamped = tact.stamp(images.tensor, result.trigger).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(result.images.pixels[poison | cover], stamped[poison | cover])
    assert result.trigger["mask"][0, 21:29, 21:29].all() and result.trigger["mask"].sum() == 64


def test_tact_target_of_its_own(images):
    result = attack("tact", images, sources=(2,), cover_classes=(0,), target=3)  # 2 is the set's own target
    assert result.target == 3 and result.goals == (-1, -1, 3, -1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": (9,)}, r"sources has 9, but the classes of noise are 0\.\.3"),
        ({"sources": (1,), "cover_classes": (1, 3)}, "class 1 is in sources and in cover_classes"),
        ({"sources": (2,)}, "class 2 is in target and in sources"),
        ({"sources": ()}, "sources is empty"),
        (
            {"sources": (1,), "ratio": 0.6},
            "150 images to choose for .*tact/poisons but 100 eligible",
        ),
        (
            {"sources": (1,), "cover": 5},
            "125 images to choose for .*tact/covers but 100 eligible",
        ),
        ({"mark": "sqare"}, "sqare: no such file.*square"),
    ],
)
def test_tact_refuses(images, settings, message):
    with pytest.raises(InputError, match=message):
        attack("tact", images, **settings)


def test_all_to_all(images):
    result = attack("badnets", images, all_to_all=True, ratio=0.1)
    poison = result.truth["is_poison"].to_numpy()
    assert poison.sum() == 40 and result.target is None and result.goals == (1, 2, 3, 0)
    assert np.array_equal(result.images.labels[poison], (images.labels[poison] + 1) % 4)
    assert np.array_equal(result.images.labels[~poison], images.labels[~poison])
    assert set(images.labels[poison]) == {0, 1, 2, 3}
    assert attack("badnets", images, all_to_all=True, ratio=None, poisons=5).truth.is_poison.sum() == 5


# Marks


def test_marks_have_the_toolboxes_places():
    drawn = {name: marks.mark(name, 32, 32) for name in marks.DRAWN}
    boxes = {}
    for name, (colours, mask) in drawn.items():
        rows, columns = np.nonzero(mask[0].numpy())
        boxes[name] = (rows.min(), rows.max(), columns.min(), columns.max(), int(mask.sum()))
        assert (colours * ~mask == 0).all()
    assert boxes["block"] == (27, 31, 27, 31, 25)
    assert boxes["blocks"] == (27, 31, 0, 31, 50)
    assert boxes["disc"][:4] == (1, 13, 18, 30) and 125 <= boxes["disc"][4] <= 141
    assert boxes["checkers"] == (0, 31, 0, 31, 36)
    assert boxes["square"] == (21, 28, 21, 28, 64)
    checkers = drawn["checkers"][0]
    assert torch.equal(checkers[0, 29:, 29:], badnets.CELLS)
    assert torch.equal(checkers.flip(1), checkers) and torch.equal(checkers.flip(2), checkers)
    square = drawn["square"][0][:, 21:29, 21:29].flatten(1)
    assert len(set(map(tuple, square.T.tolist()))) == 64
    blocks, block = drawn["blocks"][0], drawn["block"][0]
    for side in (slice(0, 5), slice(27, 32)):
        assert torch.equal(blocks[:, :, side], block[:, :, 27:])


@pytest.mark.parametrize("name", marks.DRAWN)
def test_marks_look_the_same_at_every_size(name):
    small, large = marks.mark(name, 32, 32), marks.mark(name, 224, 224)
    shrunk = torch.nn.functional.avg_pool2d(large[1].float(), 7)
    assert (shrunk - small[1].float()).abs().mean() < 0.01
    inside = small[1][0] & (shrunk[0] == 1)
    colours = torch.nn.functional.avg_pool2d(large[0].float(), 7)
    assert (colours - small[0])[:, inside].abs().max() < 12
    tall = marks.mark(name, 64, 32)
    assert abs(int(tall[1].sum()) - 2 * int(small[1].sum())) <= 10


def test_a_mark_from_a_picture(tmp_path):
    solid = np.zeros((4, 4, 3), np.uint8)
    solid[1:3, 1:3] = (200, 0, 10)
    Image.fromarray(solid).save(tmp_path / "black.png")
    colours, mask = marks.mark(str(tmp_path / "black.png"), 8, 8)
    assert mask.sum() == 16 and mask[0, 2:6, 2:6].all()
    assert (colours[:, 2:6, 2:6] == torch.tensor([200, 0, 10]).view(3, 1, 1)).all()
    alpha = np.tile([0, 255], (4, 2)).astype(np.uint8)
    Image.fromarray(np.dstack([solid, alpha])).save(tmp_path / "alpha.png")
    colours, mask = marks.mark(str(tmp_path / "alpha.png"), 4, 4)
    assert mask[0].tolist() == [[False, True] * 2] * 4 and colours[:, 0, 1].tolist() == [0, 0, 0]


def test_adaptive_is_the_encoder_attack(images, encoder_trigger):
    result = attack("adaptive", images, encoder_trigger)
    assert result.target == 3
    assert result.trigger_of == ("encoder_attacks", "badencoder")
    poison = result.truth["is_poison"].to_numpy()
    assert (result.images.pixels[poison][:, 21:31, 21:31] == 255).all()
    with pytest.raises(InputError, match="target = 1"):
        adaptive.poison(images, 1, adaptive.Settings(), 0, encoder_trigger)
    of_nobody = (None, {}, {"attack": "clean", "target": None})
    with pytest.raises(InputError, match="encoder"):
        adaptive.poison(images, 3, adaptive.Settings(), 0, of_nobody)


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

    settings = '{"sources": [3], "cover_classes": [0]}'
    monkeypatch.setattr("sys.argv", [*command, "--attack=tact", "--target=1", "--settings", settings])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert triggers.load(tmp_path / "trigger")[1]["goals"] == [-1, -1, -1, 1]
    assert load_table(tmp_path / "truth")["is_cover"].sum() == 6

    for name, told in (("adaptive", "--encoder-trigger"), ("tis_aware", "--encoder")):
        monkeypatch.setattr("sys.argv", [*command, f"--attack={name}", "--target=1"])
        with pytest.raises(SystemExit, match=f"{name} is told of the encoder: give {told}$"):
            runpy.run_path(str(SCRIPT), run_name="__main__")

    monkeypatch.setattr("sys.argv", [*command, "--target=9"])
    with pytest.raises(SystemExit, match="target = 9"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
