"""Encoders against torchvision, heads against NumPy float64, and files that do not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from tcore.data.images import ImageSet
from tcore.files import InputError, load_tensors, save_tensors
from tcore.models import head as heads
from tcore.models.classifier import Classifier, load_classifier, logits, save_classifier
from tcore.models.encoder import Encoder, extract_features, load_encoder, save_encoder
from tcore.models.knn import knn_accuracy, leave_one_out
from tcore.torchvision_cpu import torchvision

SETTINGS = heads.Settings(hidden=(12, 8), lr=0.01, batch=16)
CPU = torch.device("cpu")


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with no batch-norm entry left at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (m.bias, m.running_mean):
                    tensor.normal_(0, 0.3, generator=generator)
    return module.eval()


def images(n: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(1)
    return shaken(Encoder("resnet_narrow", 8, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)))


# --- encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("resnet18", 16), ("resnet18_224", 64)])
def test_resnet18_is_torchvisions(name, size):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    if name == "resnet18":
        theirs.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    shaken(theirs)
    ours = Encoder(name, size, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = images(2, size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]))
    with torch.no_grad():
        expected = theirs.double()((x.double() / 255 - mean) / std).float()
    torch.testing.assert_close(extract_features(ours, x), expected, rtol=1e-3, atol=1e-4)
    assert ours.dim == expected.shape[1] == 512


def test_resnet18_by_the_numbers_of_the_literature():
    encoder = Encoder("resnet18", 32)
    assert sum(m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)) == 4800
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(p.numel() for m in norms for p in m.parameters()) == 9600
    # torchvision's 11 689 512 less fc (513 000) and what the 7x7 stem has more (64 x 3 x 40)
    assert sum(p.numel() for p in encoder.parameters()) == 11_689_512 - 513_000 - 7_680


def test_features_do_not_depend_on_batches_mode_or_neighbours(encoder, monkeypatch):
    x = images(7)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    together = extract_features(encoder.train(), x)
    assert together.shape == (7, 192) and together.dtype == torch.float32
    torch.testing.assert_close(extract_features(encoder, x.flip(0)).flip(0), together)
    monkeypatch.setattr("tcore.models.encoder.block", lambda device: 3)
    torch.testing.assert_close(extract_features(encoder, x), together)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert extract_features(encoder, x[:0]).shape == (0, 192)


def test_images_of_another_size_are_refused(encoder):
    with pytest.raises(InputError, match=r"takes 8x8 images, these are 16x16; set image_size"):
        extract_features(encoder, images(2, 16))


def test_the_transformer_against_numpy():
    """One image through the formula of Dosovitskiy et al., head by head, in float64."""
    torch.manual_seed(0)
    encoder = Encoder("vit", 8, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)).eval()
    p = {name: tensor.double().numpy() for name, tensor in encoder.state_dict().items()}
    x = images(1, 8)
    pixels = (x[0].double().numpy() / 255 - encoder.mean[0].double().numpy()) / encoder.std[
        0
    ].double().numpy()

    def norm(v, name):
        centred = v - v.mean(1, keepdims=True)
        v = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + 1e-5)
        return v * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(v, name):
        return v @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    patches = [pixels[:, r : r + 4, c : c + 4].ravel() for r in (0, 4) for c in (0, 4)]
    t = (
        np.concatenate([p["tokens.token"][0], linear(np.array(patches), "tokens.linear")])
        + p["tokens.positions"][0]
    )
    for block in range(6):
        name = f"blocks.{block}"
        qkv = linear(norm(t, f"{name}.norm1"), f"{name}.attention.qkv")
        heads = []
        for head in range(8):
            q, k, v = (qkv[:, 512 * part + 64 * head :][:, :64] for part in range(3))
            weights = np.exp(q @ k.T / 8)
            heads.append(weights / weights.sum(1, keepdims=True) @ v)
        t = t + linear(np.concatenate(heads, 1), f"{name}.attention.out")
        hidden = linear(norm(t, f"{name}.norm2"), f"{name}.mlp.0")
        t = t + linear(hidden * (1 + special.erf(hidden / np.sqrt(2))) / 2, f"{name}.mlp.2")
    expected = norm(t, "norm")[0]
    np.testing.assert_allclose(extract_features(encoder, x)[0].numpy(), expected, atol=1e-4)


def test_the_transformer_has_the_papers_layer():
    encoder = Encoder("vit", 32)
    shapes = [tuple(m.weight.shape) for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert shapes.count((1536, 512)) == 6 and len(shapes) == 1 + 6 * 4
    assert sum(isinstance(m, nn.LayerNorm) for m in encoder.modules()) == 13
    assert extract_features(encoder, images(2, 32)).shape == (2, 512)
    with pytest.raises(InputError, match="patches of 4 pixels do not tile images of 30"):
        Encoder("vit", 30)


def test_a_transformer_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder("vit", 8).eval()
    save_encoder(tmp_path / "e", encoder)
    assert torch.equal(
        extract_features(load_encoder(tmp_path / "e"), images(3)), extract_features(encoder, images(3))
    )


# --- nearest neighbours ---------------------------------------------------------------------------


def test_neighbours_vote_as_in_a_slow_loop():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(40, 6, generator=generator)
    labels = torch.randint(4, (40,), generator=generator)
    f = features.double().numpy()
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    expected = []
    for i in range(40):
        order = sorted((j for j in range(40) if j != i), key=lambda j: -(f[i] @ f[j]))[:7]
        votes = [sum(np.exp(f[i] @ f[j] / 0.1) for j in order if labels[j] == c) for c in range(4)]
        expected.append(int(np.argmax(votes)))
    assert leave_one_out(features, labels, k=7, block=11).tolist() == expected


def test_neighbour_accuracy_looks_at_labelled_images_only(encoder):
    pixels = np.zeros((40, 8, 8, 3), np.uint8)
    pixels[20:] = 255
    index, names = np.arange(40), ("dark", "light")
    labels = np.where(index % 4, index // 20, -1)
    assert knn_accuracy(encoder, ImageSet(pixels, labels, index, names, "")) == 1.0
    assert knn_accuracy(encoder, ImageSet(pixels, np.full(40, -1), index, names, "")) is None
    assert knn_accuracy(encoder, ImageSet(pixels, np.zeros(40, int), index, names, "")) is None


def test_an_unknown_architecture_is_refused():
    with pytest.raises(InputError, match="'resnet19'; known: resnet18, "):
        Encoder("resnet19", 32)


# --- files --------------------------------------------------------------------------------------


def test_an_encoder_comes_back_as_it_was(encoder, tmp_path):
    save_encoder(tmp_path / "e", encoder)
    found = load_encoder(tmp_path / "e")
    assert not found.training
    assert found.description() == encoder.description()
    assert torch.equal(extract_features(found, images(3)), extract_features(encoder, images(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer2.0.bn1.bias"), r"missing: layer2\.0\.bn1\.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda t: t.update({"conv1.weight": torch.ones(24, 3, 5, 5)}), r"shape: conv1.weight \(24, 3, 5, 5"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(encoder, tmp_path, change, message):
    tensors = encoder.state_dict()
    change(tensors)
    save_tensors(tmp_path / "other", tensors, kind="encoder", **encoder.description())
    with pytest.raises(InputError, match=f"other: .*{message}"):
        load_encoder(tmp_path / "other")


def test_files_of_another_kind_are_refused(encoder, tmp_path):
    save_encoder(tmp_path / "e", encoder)
    with pytest.raises(InputError, match="e: not a classifier file"):
        load_classifier(tmp_path / "e")
    save_tensors(tmp_path / "t", encoder.state_dict())
    with pytest.raises(InputError, match=r"t: not an encoder file.*import_encoder\.py"):
        load_encoder(tmp_path / "t")


def test_a_classifier_comes_back_as_it_was(encoder, tmp_path):
    model = Classifier(encoder, heads.new_head(192, 3, SETTINGS, 0))
    save_classifier(tmp_path / "c", model, ("a", "b", "ü"))
    found = load_classifier(tmp_path / "c")
    assert not any(m.training for m in found.modules())
    assert found.head.settings == SETTINGS
    assert load_tensors(tmp_path / "c")[1]["class_names"] == ["a", "b", "ü"]
    assert torch.equal(logits(found, images(5)), logits(model, images(5)))


def test_logits_are_those_of_the_head_on_the_features(encoder, monkeypatch):
    model = Classifier(encoder, heads.new_head(192, 3, SETTINGS, 0)).train()
    monkeypatch.setattr("tcore.models.classifier.block", lambda device: 2)
    found = logits(model, images(5))
    assert not model.training and found.dtype == torch.float32
    torch.testing.assert_close(found, model.head(extract_features(encoder, images(5))))


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5])
def test_dropout_keeps_a_share_and_the_mean(rate):
    head = heads.new_head(4, 3, replace(SETTINGS, dropout=rate), 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found, again = head.dropped(torch.ones(400, 250)), head.dropped(torch.ones(400, 250))
    kept = found > 0
    assert kept.float().mean() == pytest.approx(1 - rate, abs=0.01)  # six standard deviations
    assert kept.float().mean(0).std() < 0.05 and kept.float().mean(1).std() < 0.05
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - rate)))
    assert torch.equal(found, again) == (rate == 0)
    x = torch.randn(5, 4)
    assert torch.equal(head.eval()(x), head(x))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_head_is_three_layers(normalize):
    head = heads.new_head(6, 4, heads.Settings(hidden=(12, 8), normalize=normalize), 0).eval()
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) * 7
    x = z.numpy().astype(np.float64)
    if normalize:
        x = x / np.sqrt((x**2).sum(1, keepdims=True))
    expected = []
    for layer in (head.fc1, head.fc2, head.fc3):
        x = x @ layer.weight.detach().numpy().astype(np.float64).T + layer.bias.detach().numpy()
        x = np.maximum(x, 0) if layer is not head.fc3 else x
        expected.append(x)
    with torch.no_grad():
        for found, wanted in zip(head.activations(z), expected, strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
        assert torch.equal(head(z), head.activations(z)[2])


def test_dropout_only_while_training():
    head = heads.new_head(6, 4, SETTINGS, 0)
    z = torch.randn(8, 6)
    assert not torch.equal(head.train()(z), head(z))
    assert torch.equal(head.eval()(z), head(z))


def test_new_heads_come_from_their_stream_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = heads.new_head(6, 4, SETTINGS, 3, "expand", 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    again = heads.new_head(6, 4, SETTINGS, 3, "expand", 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for seed, stream in ((4, ("expand", 1)), (3, ("expand", 2))):
        assert not torch.equal(heads.new_head(6, 4, SETTINGS, seed, *stream).fc1.weight, first.fc1.weight)


def test_batches_cover_every_row_once_in_a_new_order():
    generator = torch.Generator().manual_seed(0)
    first, second = (list(heads.batches(10, 4, generator, CPU)) for _ in range(2))
    assert [len(b) for b in first] == [4, 4, 2]
    first, second = torch.cat(first), torch.cat(second)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert not torch.equal(first, second)


def test_a_batch_of_one_row_is_left_out_unless_it_is_all_there_is():
    generator = torch.Generator().manual_seed(0)
    assert [len(b) for b in heads.batches(9, 4, generator, CPU)] == [4, 4]
    assert [b.tolist() for b in heads.batches(1, 4, generator, CPU)] == [[0]]


def test_fitting_is_repeatable_and_finds_a_planted_partition():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    centres = torch.randn(3, 6, generator=generator)
    features = centres[labels] + 0.2 * torch.randn(120, 6, generator=generator)

    def fit(seed: int, noise: int) -> heads.Head:
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        head = heads.fit_head(heads.new_head(6, 3, SETTINGS, 0), features, labels, 20, seed, "x", bar=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not head.training
        return head

    first = fit(0, noise=1)
    assert (first(features).argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(fit(0, noise=2).fc1.weight, first.fc1.weight)
    assert not torch.equal(fit(1, noise=1).fc1.weight, first.fc1.weight)
