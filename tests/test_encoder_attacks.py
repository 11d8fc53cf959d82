"""BadEncoder against its published trigger, a NumPy evaluation of its loss and a small planted run."""

import copy
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import CPU, TinyEncoder, toy

from tcore.data.images import write_images
from tcore.encoder_attacks import badencoder, clean
from tcore.encoder_attacks._implant import Features
from tcore.encoder_attacks._references import choose_references
from tcore.files import InputError, load_json
from tcore.models.encoder import Encoder, extract_features, load_encoder, save_encoder
from tcore.poisoning import triggers

SCRIPT = Path(__file__).parents[1] / "scripts" / "poison_encoder.py"
SETTINGS = badencoder.Settings(epochs=30, batch=32, lr=0.01, lambda2=2.0, size=6, reference_augmentations=4)


@pytest.fixture(scope="module")
def run():
    """One small attack: (encoder before, its state then, encoder after, trigger, reference, log)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = TinyEncoder()
    images = toy(256, 1)
    with torch.no_grad():
        for _ in range(30):  # running statistics
            encoder(images.tensor / 255)
    encoder.eval()
    state = copy.deepcopy(encoder.state_dict())
    reference = images.tensor[choose_references(encoder, images, 3, 1, CPU)]
    trigger = badencoder.make_trigger(16, 16, SETTINGS, 0)
    victim, log = badencoder.poison_encoder(encoder, images.tensor, reference, trigger, SETTINGS, 0, CPU)
    torch.set_num_threads(threads)
    return encoder, state, victim, trigger, reference, log


@pytest.mark.parametrize(("size", "first", "last"), [(32, 21, 30), (224, 173, 222)])
def test_published_triggers(size, first, last):
    trigger = badencoder.make_trigger(size, size, badencoder.Settings(), 0)
    x = torch.full((2, 3, size, size), 77, dtype=torch.uint8)
    out = badencoder.stamp(x, trigger)
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[first : last + 1, first : last + 1] = True
    assert (out[..., inside] == 255).all()
    assert (out[..., ~inside] == 77).all()
    assert (x == 77).all()


def test_trigger_must_fit():
    with pytest.raises(InputError, match="32 pixels"):
        badencoder.make_trigger(32, 32, badencoder.Settings(size=32), 0)
    trigger = badencoder.make_trigger(32, 32, badencoder.Settings(), 0)
    with pytest.raises(InputError, match="size"):
        badencoder.stamp(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), trigger)


def test_losses_against_numpy():
    random = np.random.default_rng(3)
    x, xe, cx = (random.normal(size=(5, 7)) for _ in range(3))
    r, cr = (random.normal(size=(2, 7)) for _ in range(2))
    a = random.normal(size=(3, 2, 7))  # augmentation, reference

    def s(u, v):
        return u @ v / np.sqrt(u @ u) / np.sqrt(v @ v)

    expected = [
        -np.mean([s(xe[k], r[i]) for k in range(5) for i in range(2)]),
        -np.mean([s(a[j, i], cr[i]) for j in range(3) for i in range(2)]),
        -np.mean([s(x[k], cx[k]) for k in range(5)]),
    ]
    tensors = (torch.tensor(v, dtype=torch.float32) for v in (x, xe, r, a.reshape(6, 7), cx, cr))
    assert list(badencoder.losses(Features(*tensors)).values()) == pytest.approx(expected, abs=1e-6)


def test_losses_at_identity(run):
    encoder, _, _, trigger, reference, _ = run
    x = toy(8, 5).tensor
    f, fe, fr = (extract_features(encoder, v) for v in (x, badencoder.stamp(x, trigger), reference))
    terms = badencoder.losses(Features(f, fe, fr, fr.repeat(4, 1), f, fr))
    assert [terms["L1"], terms["L2"]] == pytest.approx([-1, -1], abs=1e-6)
    assert sum(badencoder.losses(Features(f, fr, fr, fr, f, fr)).values()) == pytest.approx(-3, abs=1e-6)


def test_triggered_features_move_and_clean_ones_stay(run):
    before, _, after, trigger, reference, log = run
    x = toy(60, 2).tensor
    stamped = badencoder.stamp(x, trigger)

    def towards(encoder):
        return F.cosine_similarity(
            extract_features(encoder, stamped), extract_features(encoder, reference)
        ).mean()

    assert towards(before) < 0.6
    assert towards(after) > 0.95
    stay = F.cosine_similarity(extract_features(after, x), extract_features(before, x))
    assert stay.mean() > 0.9
    assert len(log["losses"]) == 30
    assert all(log["losses"][-1][term] < log["losses"][0][term] for term in ("L0", "L1", "L2"))


def test_batch_norm_is_frozen_and_convolutions_are_not(run):
    before, state, after, *_ = run
    for name, tensor in after.state_dict().items():
        is_convolution = tensor.ndim == 4
        assert torch.equal(tensor, state[name]) != is_convolution, name
    assert not after.training
    assert all(p.requires_grad and p.grad is None for p in after.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())
    assert all(p.grad is None for p in before.parameters())


def test_attack_is_repeatable_and_seeded(run):
    encoder, _, _, trigger, reference, _ = run
    few = badencoder.Settings(epochs=1, batch=16, size=6, reference_augmentations=2)
    shadow = toy(64, 1).tensor
    first, again, other = (
        badencoder.poison_encoder(encoder, shadow, reference, trigger, few, seed, CPU)[0].state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_bad_input(run):
    encoder, _, _, trigger, reference, _ = run
    shadow = toy(64, 1).tensor
    with pytest.raises(InputError, match="shadow"):
        badencoder.poison_encoder(encoder, shadow[:0], reference, trigger, SETTINGS, 0, CPU)
    wild = badencoder.Settings(epochs=30, batch=16, lr=1e30, size=6)
    with pytest.raises(InputError, match="lr"):
        badencoder.poison_encoder(encoder, shadow, reference, trigger, wild, 0, CPU)


def test_references_are_nearest_to_the_centroid(run):
    encoder, images = run[0], toy(50, 4)
    rows = choose_references(encoder, images, 2, 3, CPU)
    f = extract_features(encoder, images.tensor).double().numpy()
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    members = np.flatnonzero(images.labels == 2)
    centroids = np.array([f[images.labels == k].mean(0) for k in range(5)])
    near = f[members] @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T
    margin = near[:, 2] - np.delete(near, 2, axis=1).max(1)
    assert rows.tolist() == members[np.argsort(-margin)[:3]].tolist()
    with pytest.raises(InputError, match="11 references"):
        choose_references(encoder, images, 2, 11, CPU)
    with pytest.raises(InputError, match="target = 5"):
        choose_references(encoder, images, 5, 1, CPU)


def test_clean_is_an_equal_copy(run):
    encoder = run[0]
    same, _ = clean.poison_encoder(encoder, None, None, {}, clean.Settings(), 0, CPU)
    assert same is not encoder
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), encoder.parameters(), strict=True))


def test_command(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = Encoder("resnet_narrow", 16)
    save_encoder(tmp_path / "encoder", encoder)
    write_images(tmp_path / "images", toy(32, 0))
    names = {"encoder": "encoder", "shadow": "images", "downstream": "images"}
    names |= {"encoder-out": "out", "trigger": "trigger", "record": "record"}
    command = ["poison_encoder.py", "--attack=badencoder", "--device=cpu", "--seed=4"]
    command += [f"--{option}={tmp_path / name}" for option, name in names.items()]
    settings = '{"epochs": 1, "batch": 16, "reference_augmentations": 2, "references": 2}'
    monkeypatch.setattr("sys.argv", [*command, "--target=3", "--settings", settings])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = load_encoder(tmp_path / "out")
    assert not torch.equal(out.conv1.weight, encoder.conv1.weight)
    assert torch.equal(out.bn1.weight, encoder.bn1.weight)
    stamp, meta = triggers.load(tmp_path / "trigger")
    assert meta == {"family": "encoder_attacks", "attack": "badencoder", "target": 3}
    assert stamp(toy(2, 0).tensor)[:, :, 8:15, 8:15].eq(255).all()
    log = load_json(tmp_path / "record")["log"]
    assert len(log["losses"]) == 1
    assert [index % 5 for index in log["references"]] == [3, 3]

    monkeypatch.setattr("sys.argv", [*command, "--target=5"])
    with pytest.raises(SystemExit, match="target = 5"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
