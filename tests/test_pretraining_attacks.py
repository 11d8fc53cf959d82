"""CTRL, SSLBackdoor, CorruptEncoder: trigger against formulas, geometry, counts, and what stays as it was."""

import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from toys import toy

from tcore.data import augment
from tcore.data.images import ImageSet, read_images, write_images
from tcore.dataset_attacks import adaptive
from tcore.encoder_attacks import _patch, corruptencoder, ctrl, sslbackdoor
from tcore.experiment import registry
from tcore.files import InputError, load_json, load_table
from tcore.poisoning import triggers

SCRIPT = Path(__file__).parents[1] / "scripts" / "poison_images.py"
TARGET = 3
ATTACKS = {
    "ctrl": ctrl.Settings(rate=0.05, window=16, bands=(5, 9)),
    "sslbackdoor": sslbackdoor.Settings(size=4),
    "corruptencoder": corruptencoder.Settings(rate=0.1, size=3),
}


def photos(n: int = 60, size: int = 16, seed: int = 0) -> ImageSet:
    """Noise with the classes a to e; their indices start at 100 and leave gaps."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return ImageSet(pixels, np.arange(n) % 5, 100 + 2 * np.arange(n), tuple("abcde"), "noise")


def poison(name: str, images: ImageSet, downstream: ImageSet, seed: int = 0, **changes):
    attack = registry.load("encoder_attacks", name)
    settings = type(ATTACKS[name])(**(vars(ATTACKS[name]) | changes))
    trigger = attack.make_trigger(*images.pixels.shape[1:3], settings, seed)
    return attack.poison_images(images, downstream, TARGET, trigger, settings, seed)


# --- what all three have to do ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "poisons", "rows"), [("ctrl", 3, 60), ("sslbackdoor", 6, 60), ("corruptencoder", 6, 66)]
)
def test_poisons_are_as_many_as_asked_and_the_rest_stays(name, poisons, rows):
    images, before = photos(), photos()
    result = poison(name, images, photos(seed=5))
    table = result.truth
    assert len(result.images) == len(table) == rows
    assert table["index"].tolist() == result.images.index.tolist() and table["index"].is_unique
    assert table.is_poison.sum() == poisons and not table.is_cover.any()
    changed = [not np.array_equal(a, b) for a, b in zip(images.pixels, result.images.pixels, strict=False)]
    assert np.array_equal(changed, table.is_poison[:60])
    assert np.array_equal(result.images.labels[:60], images.labels)
    if rows == 60:
        assert set(table.clean_label[table.is_poison]) == {TARGET}
    else:
        assert set(result.images.labels[60:]) == set(table.clean_label[60:]) == {-1}
    assert np.array_equal(images.pixels, before.pixels)
    assert result.target == TARGET and result.trigger_of == ("encoder_attacks", name)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_seed_decides_and_nothing_else(name):
    images, downstream = photos(), photos(seed=5)
    torch.manual_seed(1)
    first = poison(name, images, downstream)
    torch.manual_seed(2)
    again, other = poison(name, images, downstream), poison(name, images, downstream, seed=1)
    assert np.array_equal(first.images.pixels, again.images.pixels)
    assert not np.array_equal(first.images.pixels, other.images.pixels)


def test_ctrl_takes_all_of_a_class_that_is_smaller_than_asked():
    """GTSRB: 392 wanted of a class of 210, and the original takes what there is."""
    images = photos()
    result = poison("ctrl", images, images, rate=0.5)
    assert result.log == {"wanted": 30}
    assert np.array_equal(result.truth["is_poison"], images.labels == TARGET)


@pytest.mark.parametrize("name", ["ctrl", "sslbackdoor"])
def test_the_class_goes_by_its_name_and_may_come_from_downstream(name):
    images, downstream = photos(), photos(seed=5)
    turned = ImageSet(images.pixels, images.labels, images.index, tuple("edcba"), "turned")  # d is 1 here
    assert set(poison(name, turned, downstream).truth.query("is_poison").clean_label) == {1}
    unlabelled = ImageSet(images.pixels, np.full(60, -1), images.index, (), "open")
    with pytest.raises(InputError, match="open has no class 'd'; set source to downstream"):
        poison(name, unlabelled, downstream)
    named = ImageSet(images.pixels, np.full(60, -1), images.index, tuple("abcde"), "open")
    with pytest.raises(InputError, match="no image of open is labelled 'd'; set source to downstream"):
        poison(name, named, downstream)
    added = poison(name, unlabelled, downstream, source="downstream")
    assert np.array_equal(added.images.pixels[:60], images.pixels)
    n = added.truth.is_poison.sum()
    assert n == len(added.images) - 60 > 0 and added.images.index[60] == images.index.max() + 1
    near = np.abs(added.images.pixels[60:, None].astype(int) - downstream.pixels[downstream.labels == TARGET])
    assert near.mean((2, 3, 4)).min(1).max() < 40  # each is one of the class, stamped; unlike noise: 85
    with pytest.raises(InputError, match="source = 'web'"):
        poison(name, images, downstream, source="web")


@pytest.mark.parametrize("name", ATTACKS)
def test_stamping_does_not_depend_on_neighbours_or_batches(name):
    attack = registry.load("encoder_attacks", name)
    trigger = attack.make_trigger(16, 16, ATTACKS[name], 0)
    x = photos(300).tensor
    before, together = x.clone(), attack.stamp(x, trigger)
    assert together.dtype == torch.uint8 and together.shape == x.shape
    parts = torch.cat([attack.stamp(part, trigger) for part in x.split(7)])
    assert torch.equal(parts, together) and torch.equal(x, before)
    assert torch.equal(attack.stamp(x.flip(0).contiguous(), trigger).flip(0), together)
    assert attack.stamp(x[:0], trigger).shape == (0, 3, 16, 16)
    assert (together != x).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_threat_3_uses_the_same_trigger(name):
    attack, images = registry.load("encoder_attacks", name), photos()
    trigger = attack.make_trigger(16, 16, ATTACKS[name], 0)
    meta = {"family": "encoder_attacks", "attack": name, "target": TARGET}
    given = (partial(attack.stamp, trigger=trigger), trigger, meta)
    result = adaptive.poison(images, None, adaptive.Settings(), 0, given)
    rows = result.truth.is_poison.to_numpy(copy=True)
    assert rows.sum() == 3 and set(result.images.labels[rows]) == {TARGET}
    expected = attack.stamp(images.tensor[torch.from_numpy(rows)], trigger)
    assert torch.equal(result.images.tensor[torch.from_numpy(rows)], expected)


@pytest.mark.parametrize("name", ATTACKS)
def test_command(name, tmp_path, monkeypatch):
    write_images(tmp_path / "images", photos())
    write_images(tmp_path / "downstream", toy(60, 0))
    outputs = ("poisoned", "truth", "trigger", "record")
    files = [f"--{option}={tmp_path / option}" for option in ("images", "downstream", *outputs)]
    settings = {"ctrl": '{"window": 16, "bands": [5, 9], "rate": 0.05}', "corruptencoder": '{"rate": 0.1}'}
    command = ["poison_images.py", *files, f"--attack={name}", "--settings", settings.get(name, "{}")]
    monkeypatch.setattr("sys.argv", [*command, f"--target={TARGET}", "--seed=2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    truth, images = load_table(tmp_path / "truth"), read_images(tmp_path / "poisoned")
    assert truth["index"].tolist() == images.index.tolist()
    record = load_json(tmp_path / "record")
    assert record["settings"]["attack"] == name and record["settings"]["target"] == TARGET
    assert record["log"]["poisons"] == truth.is_poison.sum() > 0
    stamp, meta = triggers.load(tmp_path / "trigger")
    assert meta == {"family": "encoder_attacks", "attack": name, "target": TARGET}
    assert stamp(images.tensor[:2]).shape == (2, 3, 16, 16)

    monkeypatch.setattr("sys.argv", [*command, "--target=5"])
    with pytest.raises(SystemExit, match="target = 5"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


# --- CTRL ---------------------------------------------------------------------------------------


def dct_matrix(n: int) -> np.ndarray:
    """Rows are the orthonormal DCT-II's cosines, by definition."""
    k, x = np.arange(n)[:, None], np.arange(n)
    basis = np.sqrt(2 / n) * np.cos(np.pi * (2 * x + 1) * k / (2 * n))
    basis[0] /= np.sqrt(2)
    return basis


@pytest.mark.parametrize(
    ("size", "window", "bands"), [(32, 32, (15, 31)), (64, 32, (15, 31)), (16, 16, (3, 5))]
)
def test_ctrl_fills_its_bands_of_u_and_v_and_no_others(size, window, bands):
    added = ctrl.pattern(size, size, window, bands, 50.0)
    to_yuv = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
    basis = dct_matrix(window)
    assert np.allclose(basis @ basis.T, np.eye(window))
    expected = np.zeros((window, window))
    expected[list(bands), list(bands)] = 50
    for top in range(0, size, window):
        for left in range(0, size, window):
            yuv = np.einsum("kc,chw->khw", to_yuv, added[:, top : top + window, left : left + window])
            y, u, v = basis @ yuv @ basis.T
            # The two published matrices are each other's inverse to about 1 %.
            np.testing.assert_allclose(u, expected, atol=0.6)
            np.testing.assert_allclose(v, expected, atol=0.6)
            np.testing.assert_allclose(y, 0, atol=0.6)
            outside = expected == 0
            assert max(np.abs(part[outside]).max() for part in (y, u, v)) < 1e-9


def test_ctrl_has_the_published_strength():
    rms = np.sqrt(np.square(ctrl.pattern(32, 32, 32, (15, 31), 100.0)).mean((1, 2)))
    assert rms == pytest.approx([5.0, 4.3, 9.0], abs=0.05)  # grey levels; 32.0 dB
    assert 20 * np.log10(255 / np.sqrt(np.mean(rms**2))) == pytest.approx(32.0, abs=0.05)


def test_ctrl_adds_rounds_and_clamps_and_can_be_taken_off():
    trigger = ctrl.make_trigger(32, 32, ctrl.Settings(magnitude=50.0), 0)
    added = ctrl.pattern(32, 32, 32, (15, 31), 100.0)
    assert torch.equal(trigger["added_train"] * 2, (trigger["added"] / 2).round().int() * 2) or (
        (trigger["added_train"] * 2 - trigger["added"]).abs().max() <= 1
    )
    x = photos(5, 32).tensor
    out = ctrl.stamp(x, trigger).numpy()
    exact = x.numpy() + added
    assert np.abs(out - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-3
    middle = (exact > 0) & (exact < 255)
    assert np.abs((out - added - x.numpy())[middle]).max() <= 0.5 + 1e-3
    assert out.min() == 0 and out.max() == 255


def test_ctrl_uses_its_training_strength_on_poisons():
    images = ImageSet(
        np.full((60, 16, 16, 3), 128, np.uint8), np.arange(60) % 5, np.arange(60), tuple("abcde"), "grey"
    )
    result = poison("ctrl", images, images, magnitude=40.0, magnitude_test=80.0)
    change = result.images.pixels[result.truth.is_poison].astype(float) - 128
    for strength, share in ((40.0, 1), (80.0, 2)):
        expected = ctrl.pattern(16, 16, 16, (5, 9), strength).transpose(1, 2, 0)
        assert np.abs(share * change - expected).max() <= 0.5 * share + 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"window": 24}, "windows of 24"), ({"bands": (5, 32)}, r"bands \(5, 32\) should lie in 0..31")],
)
def test_ctrl_refuses_what_does_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        ctrl.make_trigger(32, 32, ctrl.Settings(**changes), 0)


# --- the patch ----------------------------------------------------------------------------------


def corners(before: torch.Tensor, after: torch.Tensor, side: int) -> np.ndarray:
    """Where the changed square of each image begins; everything else is unchanged."""
    changed = (before != after).any(1).numpy()
    found = []
    for one in changed:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
        found.append((rows[0], columns[0]))
    return np.array(found)


def test_patch_is_saturated_and_of_the_published_size():
    for size, side in ((32, 8), (224, 50)):
        patch = sslbackdoor.make_trigger(size, size, sslbackdoor.Settings(), 0)["patch"]
        assert patch.shape == (3, side, side)
    for size, side in ((32, 6), (224, 40)):
        assert corruptencoder.make_trigger(size, size, corruptencoder.Settings(), 0)["patch"].shape[1] == side
    grid = _patch.make_trigger("x", 32, 32, 4, 10, (0.25, 0.75))["patch"]
    assert (grid.max(0).values == 255).all() and (grid.min(0).values == 0).all()  # pure hues
    assert len(grid.flatten(1).unique(dim=1).T) == 16
    assert not torch.equal(grid, _patch.make_trigger("x", 32, 32, 4, 11, (0.25, 0.75))["patch"])


def test_test_places_come_from_the_bytes_and_fill_their_range():
    x = photos(2000, 32).tensor // 4 + 64  # no byte equals the patch's 0 or 255
    trigger = _patch.make_trigger("x", 32, 32, 4, 10, (0.1, 0.9))
    found = corners(x, _patch.stamp(x, trigger), 4)
    assert found.min() == 3 and found.max() == 29 - 4
    for axis in found.T:
        assert stats.chisquare(np.bincount(axis - 3, minlength=23)).pvalue > 1e-3
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.08
    moved = x.clone()
    moved[:, 0, 0, 0] += 1
    assert (corners(moved, _patch.stamp(moved, trigger), 4) != found).any(1).mean() > 0.9


def test_sslbackdoor_trains_in_the_middle_half():
    images = ImageSet(
        np.full((2000, 16, 16, 3), 99, np.uint8), np.arange(2000) % 5, np.arange(2000), tuple("abcde"), ""
    )
    result = poison("sslbackdoor", images, images)
    rows = torch.from_numpy(result.truth.is_poison.to_numpy(copy=True))
    found = corners(images.tensor[rows], result.images.tensor[rows], 4)
    assert found.min() == 4 and found.max() == 8  # 4..11 hold four pixels
    assert len(np.unique(found, axis=0)) == 25


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="sslbackdoor: a patch of 14 pixels"):
        sslbackdoor.make_trigger(16, 16, sslbackdoor.Settings(size=14), 0)
    trigger = corruptencoder.make_trigger(16, 16, corruptencoder.Settings(), 0) | {
        "patch": torch.zeros(3, 9, 9)
    }
    with pytest.raises(InputError, match="a patch of 9 pixels does not fit beside"):
        corruptencoder.poison_images(photos(), photos(), TARGET, trigger, ATTACKS["corruptencoder"], 0)


# --- CorruptEncoder -----------------------------------------------------------------------------


def flat(value: int, n: int = 200) -> ImageSet:
    pixels = np.full((n, 32, 32, 3), value, np.uint8)
    return ImageSet(pixels, np.arange(n) % 5, np.arange(n), tuple("abcde"), "flat")


def test_composites_by_hand():
    """Grey backgrounds, white references, a patch without white and grey: every pixel says what it is."""
    result = poison("corruptencoder", flat(90), flat(255), rate=1.0, size=8)
    poisons = result.images.pixels[200:]
    whites, greys = (poisons == 255).all(3), (poisons == 90).all(3)
    patches = ~whites & ~greys
    assert (patches.sum((1, 2)) == 8 * 4).all()  # of a canvas twice as wide as high, so half as wide here
    starts = np.array([np.flatnonzero(one.all(0))[0] for one in whites])
    assert (whites.sum((1, 2)) == 32 * 16).all()
    left, right = starts < 8, starts >= 8
    assert set(starts) == {0, 1, 15, 16} and 60 < left.sum() < 140  # 5 % of 32 columns: at most one
    for half, first, last in ((left, 20, 27), (right, 4, 11)):  # W/2 + W/8 .. W - W/8, or W/8 .. W/2 - W/8
        rows, columns = patches[half].any((0, 2)).nonzero()[0], patches[half].any((0, 1)).nonzero()[0]
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 23, first, last)
    assert result.images.aspects.tolist() == [1.0] * 200 + [2.0] * 200


def test_without_masks_the_whole_reference_is_the_object():
    x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    x[..., 16:] = 200
    objects, opacity, aspects = corruptencoder.cut(x, None)
    assert objects.shape == (1, 3, 32, 16) and (opacity == 1).all() and aspects.tolist() == [2.0]
    assert (objects[..., :7] < 1).all() and (objects[..., 9:] > 199).all()  # both halves, each half as wide


def test_with_masks_it_is_the_bounding_box_and_the_rest_shows_through():
    x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 4:20, 10:18] = 200
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 4:20, 10:14] = True
    mask[:, 12:20, 14:18] = True  # an L: the box is 16 x 8, stretched twice to 32 x 16
    objects, opacity, aspects = corruptencoder.cut(x, mask)
    assert aspects.tolist() == [2 * 8 / 16]
    torch.testing.assert_close(objects, torch.full_like(objects, 200.0))
    inside, outside = opacity[0, 0, 28, 12], opacity[0, 0, 3, 12]
    assert inside == pytest.approx(1, abs=1e-3) and outside == pytest.approx(0, abs=1e-3)
    edge = opacity[0, 0, 2, 4:12]  # blurred: falls from inside to outside, through one half
    assert (edge.diff() <= 1e-6).all() and edge[3] > 0.5 > edge[4]
    grey = torch.full((1, 3, 32, 32), 50.0)
    out = corruptencoder.composites(grey, objects, opacity, torch.tensor([True]), torch.tensor([0]))
    assert (out[..., :16] == 50).all()
    assert out[0, 0, 28, 28] == pytest.approx(200, abs=0.2) and out[0, 0, 3, 28] == pytest.approx(50, abs=0.2)


def test_backdrops_cover_the_canvas_undistorted():
    """On two ramps every pixel says where in the photograph it comes from."""
    ramp = torch.zeros(1, 3, 32, 32)
    ramp[:, 0], ramp[:, 1] = torch.arange(32.0), torch.arange(32.0).view(-1, 1)
    wide, high = corruptencoder.backdrops(
        ramp.repeat(2, 1, 1, 1), torch.tensor([2.0, 0.5]), torch.tensor([0.3, 1.0])
    )
    # Twice as wide as high: all columns and the lower half of the rows. The other way: the right half.
    torch.testing.assert_close(wide[0], ramp[0, 0])
    torch.testing.assert_close(wide[1, :, 0], 15.75 + torch.arange(32) / 2, atol=0.26, rtol=0)
    torch.testing.assert_close(high[1], ramp[0, 1])
    torch.testing.assert_close(high[0, 0], 15.75 + torch.arange(32) / 2, atol=0.26, rtol=0)


def test_plus_puts_two_images_of_the_class_side_by_side():
    downstream = photos(60, 32, seed=5)
    own = downstream.select(downstream.labels == TARGET)
    halves = corruptencoder.cut(own.tensor, None)[0].round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    options = {"rate": 1.0, "support": 0.5, "references": 1, "support_images": 2, "size": 6}
    result = poison("corruptencoder", photos(60, 32), downstream, **options)
    sides = []
    for image in result.images.pixels[60:90]:  # the first half of the poisons
        near = [
            [np.abs(image[:, at : at + 16].astype(int) - half).max() <= 1 for half in halves]
            for at in (0, 16)
        ]
        assert np.sum(near, axis=1).tolist() == [1, 1]
        sides.append(tuple(np.argmax(near, axis=1)))
    assert len({one for pair in sides for one in pair}) <= 3  # a reference and two support images
    assert len(set(sides)) >= 4  # each on either side


def test_crops_have_their_shape_in_the_canvas():
    """A window of an image stored at half its width is half as wide as it would be."""
    centres = (torch.arange(24) + 0.5) / 24
    ramp = torch.zeros(300, 3, 24, 24)
    ramp[:, 0], ramp[:, 1] = centres, centres.view(-1, 1)
    generator = torch.Generator().manual_seed(0)
    out = augment.resized_crop(ramp, generator, (0.2, 0.4), aspects=torch.full((300,), 2.0)).numpy()
    width = (np.diff(out[:, 0, 10:14, 10:14], axis=2) * 24).mean((1, 2))
    height = (np.diff(out[:, 1, 10:14, 10:14], axis=1) * 24).mean((1, 2))
    assert (2 * width / height).min() > 3 / 4 - 1e-3 and (2 * width / height).max() < 4 / 3 + 1e-3
    assert (width * height).min() > 0.2 - 1e-3 and (width * height).max() < 0.4 + 1e-3


def test_aspects_are_kept_in_files_and_selections(tmp_path):
    images = poison("corruptencoder", flat(90), flat(255), rate=0.1).images
    write_images(tmp_path / "a", images)
    assert read_images(tmp_path / "a").aspects.tolist() == images.aspects.tolist()
    assert images.select([0, 215]).aspects.tolist() == [1, 2]
    write_images(tmp_path / "b", flat(90))
    assert read_images(tmp_path / "b").aspects is None


def test_references_from_a_file_with_masks(tmp_path):
    x = np.full((1, 16, 16, 3), 255, np.uint8)
    np.savez(tmp_path / "r.npz", x=x, mask=np.ones((1, 16, 16), bool))
    grey = ImageSet(
        np.full((60, 16, 16, 3), 9, np.uint8), np.arange(60) % 5, np.arange(60), tuple("abcde"), ""
    )
    result = poison("corruptencoder", grey, grey, reference_file=str(tmp_path / "r.npz"))
    assert ((result.images.pixels[60:] == 255).all(3).mean((1, 2)) > 0.4).all()
