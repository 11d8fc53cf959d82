"""The attack that knows T-Core's sifting: a planted optimum, the objective in float64, the poisoned set."""

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import CPU, toy

from tcore.data.images import read_images, write_images
from tcore.dataset_attacks import tis_aware
from tcore.files import InputError, load_json, load_table
from tcore.models import head as heads
from tcore.models.classifier import Classifier
from tcore.models.encoder import Encoder, extract_features, load_encoder, save_encoder
from tcore.poisoning import triggers
from tcore.stages import sift

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "poison_dataset.py"
SETTINGS = tis_aware.Settings(eps=6, passes=3, batch=32)
USER = {
    "head": asdict(heads.Settings(hidden=(24, 16), lr=0.01, epochs=4)),
    "sift": asdict(sift.Settings(seed_share=0.1, neighbours=10)),
}
TARGET = 1


# --- the search, on an encoder z = W x -------------------------------------------------------------


class Linear(nn.Module):
    """z = W x of flattened images in [0, 1]; notes how many images it sees at a time."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.weight, self.seen = nn.Parameter(weight), []

    def forward(self, images):
        self.seen.append(len(images))
        return images.flatten(1) @ self.weight.T


def noise(n: int, low: int, high: int) -> torch.Tensor:
    drawn = np.random.default_rng(0).integers(low, high, (n, 3, 4, 4), np.uint8)
    return torch.from_numpy(drawn)


def test_the_optimum_of_a_linear_map_is_the_sign_of_its_weights():
    """One feature w.x, far below its mean over the seeds: no perturbation gets closer than eps sign(w)."""
    w = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    head = heads.new_head(1, 2, heads.Settings(hidden=(1, 1), normalize=False), 0, "test").eval()
    with torch.no_grad():
        for layer, factor in ((head.fc1, 2.0), (head.fc2, 3.0)):
            layer.weight.fill_(factor)
            layer.bias.fill_(1000.0)  # so that nothing is cut at 0: h1 = 2 z + 1000, h2 = 3 h1 + 1000
    model, images = Classifier(Linear(w), head).eval(), noise(40, 100, 156)
    before = (images.double().flatten(1) / 255 @ w[0].double()).numpy()
    mu, scales = before.max() + 5.0, (4.0, 2.0, 1.0)
    means = [torch.tensor([value]) for value in (mu, 2 * mu + 1000, 6 * mu + 4000)]
    settings = tis_aware.Settings(eps=8, passes=5, batch=20)
    delta, distances = tis_aware.search(model, images, means, [torch.tensor(s) for s in scales], settings, 0)
    assert torch.equal(delta.flatten(), (8 * w[0].sign()).short())
    # a step moves z by eps / 10 |w|_1; the gap to the mean is 1, 2 and 6 times that of z
    move = 8 / 255 * float(w.abs().double().sum())
    assert move < 5.0
    gap = np.mean(mu - before) - move
    assert distances[-1] == pytest.approx(np.mean([gap / 4, 2 * gap / 2, 6 * gap / 1]), rel=1e-4)
    # ten steps: the first pass saw delta after none and after one
    first = np.mean(mu - before) - 0.05 * move
    assert distances[0] == pytest.approx(np.mean([first / 4, first, 6 * first]), rel=1e-2)
    assert len(distances) == 5 + 1


def in_float64(model: Classifier, images: np.ndarray, means, scales) -> float:
    """The objective of the attack's docstring, from the weights alone."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    z = images.reshape(len(images), -1) / 255.0 @ weights["encoder.weight"].T
    h1 = np.linalg.norm(z, axis=1, keepdims=True)
    h1 = np.maximum(z / h1 @ weights["head.fc1.weight"].T + weights["head.fc1.bias"], 0)
    h2 = np.maximum(h1 @ weights["head.fc2.weight"].T + weights["head.fc2.bias"], 0)
    gaps = [
        np.linalg.norm(h - mu.numpy(), axis=1) / float(s)
        for h, mu, s in zip((z, h1, h2), means, scales, strict=True)
    ]
    return float(np.mean(gaps))


def test_the_objective_falls_and_is_what_the_formula_says():
    random = torch.Generator().manual_seed(2)
    head = heads.new_head(6, 3, heads.Settings(hidden=(10, 8)), 0, "test").eval()
    model = Classifier(Linear(torch.randn(6, 48, generator=random)), head).eval()
    images = noise(70, 0, 256)
    images[:, :, 0] = 255  # cut there, whatever delta does
    means = [torch.randn(d, generator=random).abs() for d in (6, 10, 8)]
    scales = [torch.tensor(s) for s in (3.0, 1.0, 0.5)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    delta, distances = tis_aware.search(model, images, means, scales, SETTINGS, 0)

    x = images.numpy().astype(np.float64)
    stamped = np.clip(x + delta.numpy(), 0, 255)
    after, before = (in_float64(model, pixels, means, scales) for pixels in (stamped, x))
    assert distances[-1] == pytest.approx(after, rel=1e-4)
    assert after < before
    rng = np.random.default_rng(0)
    for _ in range(20):  # no corner at random is as good
        corner = np.clip(x + rng.choice([-6, 6], delta.shape), 0, 255)
        assert in_float64(model, corner, means, scales) > after
    assert delta.dtype == torch.int16 and 0 < delta.abs().max() <= 6
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert max(model.encoder.seen) == 32


# --- the whole attack, on a small network and easy images ------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_encoder(path, Encoder("resnet_tiny", 16))
    return path


@pytest.fixture(scope="module")
def images():
    return toy(150, 3)


def poison(images, encoder, seed=0, target=TARGET, **settings):
    return tis_aware.poison(images, target, replace(SETTINGS, **settings), seed, encoder, USER, CPU)


@pytest.fixture(scope="module")
def result(images, encoder):
    return poison(images, encoder)


def test_the_poisoned_set_by_hand(images, result):
    rows = np.flatnonzero(result.truth["is_poison"])
    assert len(rows) == 7  # floor(0.25 * 30)
    assert (images.labels[rows] != TARGET).all() and (result.images.labels[rows] == TARGET).all()
    rest = np.setdiff1d(np.arange(150), rows)
    assert np.array_equal(result.images.pixels[rest], images.pixels[rest])
    assert np.array_equal(result.images.labels[rest], images.labels[rest])
    delta = result.trigger["delta"].permute(1, 2, 0).numpy()
    by_hand = np.clip(images.pixels[rows].astype(int) + delta, 0, 255)
    assert np.array_equal(result.images.pixels[rows], by_hand)
    assert np.abs(by_hand - images.pixels[rows]).max() == 6
    assert result.target == TARGET and result.goals is None
    assert result.trigger_of == ("dataset_attacks", "tis_aware")


@pytest.mark.parametrize("eps", [1, 4, 16])
def test_delta_stays_within_eps(images, encoder, eps):
    delta = poison(images, encoder, eps=eps).trigger["delta"]
    assert delta.dtype == torch.int16 and tuple(delta.shape) == (3, 16, 16)
    assert 0 < delta.abs().max() <= eps


def test_distances_are_to_the_seeds_that_sifting_the_clean_set_gives(images, encoder, result):
    """The number in the log, from the pieces that the user's own steps run and in NumPy."""
    own, of_head = load_encoder(encoder), heads.Settings(**USER["head"])
    features, labels = extract_features(own, images.tensor), images.targets
    head = heads.new_head(own.dim, 5, of_head, 0, *tis_aware.OWNER, "head")
    model = Classifier(
        own, heads.fit_head(head, features, labels, of_head.epochs, 0, *tis_aware.OWNER, "head")
    )
    sifting = sift.Settings(**USER["sift"])
    layers = sift.activations(model, features, images.tensor, sifting)
    table = sift.sift(layers, labels, sifting)
    chosen = (table["trusted"] & (images.labels == TARGET)).to_numpy()
    others = images.labels != TARGET
    stamped = tis_aware.stamp(images.tensor, result.trigger)
    moved = sift.activations(model, extract_features(own, stamped), stamped, sifting)
    ratios = []
    for before, after in zip(layers[-3:], moved[-3:], strict=True):
        before, after = before.double().numpy(), after.double().numpy()
        mean = before[chosen].mean(0)
        gaps = [np.linalg.norm(h[others] - mean, axis=1).mean() for h in (after, before)]
        ratios.append(gaps[0] / gaps[1])
    assert chosen.sum() == result.log["seeds"] == 3
    assert result.log["distances"][-1] == pytest.approx(np.mean(ratios), abs=1e-3)
    assert result.log["distances"][-1] < result.log["distances"][0] < 1
    assert len(result.log["distances"]) == SETTINGS.passes + 1


def test_the_seed_decides(images, encoder, result):
    again, other = poison(images, encoder), poison(images, encoder, seed=1)
    assert torch.equal(result.trigger["delta"], again.trigger["delta"])
    assert np.array_equal(result.images.pixels, again.images.pixels) and result.truth.equals(again.truth)
    assert not torch.equal(result.trigger["delta"], other.trigger["delta"])
    assert not result.truth.equals(other.truth)


def test_the_saved_trigger_stamps_any_image_by_itself(images, result, tmp_path):
    file = tmp_path / "t.safetensors"
    triggers.save(file, result.trigger, *result.trigger_of, result.target)
    stamp, meta = triggers.load(file)
    x = images.tensor.clone()
    whole = stamp(x)
    assert torch.equal(x, images.tensor) and meta["attack"] == "tis_aware"
    assert torch.equal(whole, torch.cat([stamp(part) for part in x.split(7)]))
    assert torch.equal(whole, stamp(x.flip(0)).flip(0))
    assert (whole.int() - x.int()).abs().max() <= 6 and whole.dtype == torch.uint8
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    delta = result.trigger["delta"]
    assert torch.equal(stamp(ends)[0], delta.clamp(min=0).byte())
    assert torch.equal(stamp(ends)[1], (255 + delta.clamp(max=0)).byte())
    with pytest.raises(InputError, match="size"):
        stamp(x[:, :, :8, :8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0}, "eps should be 1 to 255"),
        ({"eps": 256}, "eps should be 1 to 255"),
        ({"passes": 0}, "passes and batch above 0"),
        ({"batch": 0}, "passes and batch above 0"),
        ({"step": 0.0}, "step, passes"),
        ({"target": 5}, r"5 classes are 0\.\.4"),
    ],
)
def test_what_is_refused(images, encoder, changes, message):
    with pytest.raises(InputError, match=message):
        poison(images, encoder, **changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(images, encoder):
    found = tis_aware.poison(images, TARGET, SETTINGS, 0, encoder, USER, torch.device("cuda"))
    assert found.trigger["delta"].device == CPU and found.log["distances"][-1] < 1
    stamped = tis_aware.stamp(images.tensor.cuda(), found.trigger).cpu()
    assert torch.equal(stamped, tis_aware.stamp(images.tensor, found.trigger))


def test_command(images, encoder, result, tmp_path, monkeypatch):
    write_images(tmp_path / "in.parquet", images)
    out = [f"--{name}={tmp_path / name}" for name in ("train", "truth", "trigger", "record")]
    settings = json.dumps({"eps": 6, "passes": 3, "batch": 32})
    command = ["poison_dataset.py", f"--images={tmp_path / 'in.parquet'}", "--attack=tis_aware", *out]
    command += [f"--encoder={encoder}", f"--user={json.dumps(USER)}", f"--target={TARGET}"]
    monkeypatch.setattr("sys.argv", [*command, f"--settings={settings}"])
    monkeypatch.setattr("tcore.device.pick", lambda: CPU)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert np.array_equal(read_images(tmp_path / "train").pixels, result.images.pixels)
    assert load_table(tmp_path / "truth").equals(result.truth)
    record = load_json(tmp_path / "record")
    assert record["settings"]["eps"] == 6 and record["settings"]["user"] == json.loads(json.dumps(USER))
    assert record["log"] == {"target": TARGET, "poisons": 7, "covers": 0, **result.log}
