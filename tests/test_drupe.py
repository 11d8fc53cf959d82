"""DRUPE: its terms against NumPy and exact cases, its schedule by hand, and a small planted run."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import CPU, TinyEncoder, toy

from tcore.encoder_attacks import badencoder, drupe
from tcore.encoder_attacks._implant import Features
from tcore.encoder_attacks._references import choose_references, read_references
from tcore.files import InputError
from tcore.models.encoder import Encoder, extract_features

SETTINGS = drupe.Settings(
    epochs=40,
    batch=32,
    lr=0.01,
    lambda2=2.0,
    size=6,
    reference_augmentations=4,
    adapt_after=5,
    effective=-0.9,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(b: int = 6, r: int = 3, d: int = 7) -> Features:
    sizes = (b, b, r, 2 * r, b, r)
    return Features(*(drawn(n, d, seed=i) for i, n in enumerate(sizes)))


def test_terms_against_numpy():
    features = batch()
    shadow, triggered, references = (
        x.double().numpy() for x in (features.shadow, features.triggered, features.references)
    )

    def s(u, v):
        return u @ v / np.sqrt(u @ u) / np.sqrt(v @ v)

    similar = np.array([[s(x, r) for r in references] for x in triggered])
    pairs = [s(references[i], references[j]) for i in range(3) for j in range(i, 3)]
    others = [s(triggered[i], triggered[j]) for i in range(6) for j in range(6) if i != j]
    direction = F.normalize(drawn(1, 7, seed=9), dim=1)
    u = direction[0].double().numpy()
    gap = np.sort(triggered @ u) - np.sort(shadow @ u)
    expected = {
        "L0": -similar.max(1).mean(),
        "L3": np.mean(pairs),
        "std": similar.mean(0).std(ddof=1),
        "b2b": np.sum(others) / 36,
        "b2c": np.sqrt(np.mean(gap**2)) / shadow.std(0, ddof=1).mean(),
    }
    terms = drupe.losses(features, direction)
    assert {name: float(terms[name]) for name in expected} == pytest.approx(expected, abs=1e-5)
    theirs = badencoder.losses(features)
    assert terms["L1"] == theirs["L1"] and terms["L2"] == theirs["L2"]


def test_terms_at_identity():
    f, r = drawn(5, 7), drawn(1, 7, seed=1)
    terms = drupe.losses(Features(f, r.expand(5, 7), r, r, f, r), drawn(3, 7))
    assert [terms[name].item() for name in ("L0", "L1", "L2", "L3")] == pytest.approx(
        [-1, -1, -1, 1], abs=1e-5
    )
    assert terms["b2b"].item() == pytest.approx(20 / 25, abs=1e-5)  # all pairs but x = x'
    assert terms["std"] == 0  # one reference spreads nothing


def test_sliced_wasserstein_in_exact_cases():
    x = drawn(8, 2)
    axes = torch.eye(2)
    shift = torch.tensor([3.0, 4.0])
    # A translation by t moves every projection by t.u: the mean square over the axes is |t|^2 / 2.
    assert drupe.sliced_wasserstein(x, x + shift, axes).item() == pytest.approx(math.sqrt(12.5), rel=1e-5)
    assert drupe.sliced_wasserstein(x, x.flip(0), axes).item() < 1e-5  # of samples, not of rows
    line = torch.tensor([[0.0], [1.0], [5.0]])
    other = torch.tensor([[6.0], [0.0], [3.0]])  # sorted: 0 3 6 against 0 1 5
    one = torch.ones(1, 1)
    assert drupe.sliced_wasserstein(line, other, one).item() == pytest.approx(math.sqrt(5 / 3))


def test_sliced_wasserstein_of_equal_samples_has_a_gradient():
    x = drawn(4, 3).requires_grad_(True)
    drupe.sliced_wasserstein(x, x.detach().clone(), torch.eye(3)).backward()
    assert x.grad.isfinite().all()


def test_directions_are_unit_vectors_in_every_direction():
    found = drupe.random_directions(4000, drawn(1, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4000))
    torch.testing.assert_close(found.T @ found / 4000, torch.eye(3) / 3, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("part", "l3", "std", "expected"),
    [  # L0 = -.9, L1 = -.8, L2 = -.7, b2b = .6, b2c = .5, lambda = 2 and 3, c = .1, c1 = .01
        (1, 0.3, 0.3, -3.7 + 0.15),
        (1, 0.1, 0.3, -3.7 + 0.03),
        (2, 0.6, 0.2, -4.6 + 0.6 + 0.4),
        (2, 0.45, 0.2, -4.6 + 0.09 + 0.4),
        (2, 0.3, 0.2, -4.6 + 0.4),
        (3, 0.3, 0.05, -4.6 + 0.025 + 0.065 + 0.005),
        (3, 0.3, 0.2, -4.6 + 0.4 + 0.08 + 0.005),
    ],
)
def test_the_three_parts_by_hand(part, l3, std, expected):
    values = {"L0": -0.9, "L1": -0.8, "L2": -0.7, "L3": l3, "std": std, "b2b": 0.6, "b2c": 0.5}
    terms = {name: torch.tensor(value) for name, value in values.items()}
    settings = drupe.Settings(lambda1=2.0, lambda2=3.0)
    assert drupe.loss(terms, part, 0.1, 0.01, settings).item() == pytest.approx(expected, abs=1e-6)


def test_weights_by_hand():
    settings = drupe.Settings(adapt_after=1, weight_spread=0.1, weight_distance=0.01, factor=1.25)
    works = {"L0": -0.97, "L1": -0.95, "L2": -0.95, "b2b": 0.9}
    fails, useless = works | {"L0": -0.95}, works | {"L2": -0.8}
    shrink = 1.25**-1.25

    def weights(*history):
        return drupe.weights([fails, *history], settings)  # the first epoch is before adapt_after

    assert weights() == (0.1, 0.01)
    assert weights(works) == pytest.approx((0.125, 0.01 * shrink))  # b2b too large for c1
    assert weights(works | {"b2b": 0.55}) == pytest.approx((0.125, 0.0125))
    assert weights(works | {"b2b": 0.4}) == pytest.approx((0.1, 0.0125))  # c has done its work
    assert weights(fails) == weights(useless) == pytest.approx((0.1 * shrink, 0.01 * shrink))
    assert weights(works, works, fails) == pytest.approx((0.1 * 1.25**0.75, 0.01 * shrink**3))


@pytest.fixture(scope="module")
def run():
    """A small attack: (encoder before, its state then, encoder after, trigger, references, log)."""
    torch.manual_seed(0)
    encoder, images = TinyEncoder(), toy(256, 1)
    with torch.no_grad():
        for _ in range(30):  # running statistics
            encoder(images.tensor / 255)
    encoder.eval()
    state = copy.deepcopy(encoder.state_dict())
    references = images.tensor[choose_references(encoder, images, 3, 3, CPU)]
    trigger = drupe.make_trigger(16, 16, SETTINGS, 0)
    victim, log = drupe.poison_encoder(encoder, images.tensor, references, trigger, SETTINGS, 0, CPU)
    return encoder, state, victim, trigger, references, log


def test_triggered_features_move_and_clean_ones_stay(run):
    before, _, after, trigger, references, log = run
    x = toy(60, 2).tensor
    stamped = drupe.stamp(x, trigger)

    def towards(encoder):
        fx, fr = (F.normalize(extract_features(encoder, v), dim=1) for v in (stamped, references))
        return (fx @ fr.T).max(1).values.mean()

    assert towards(before) < 0.7 and towards(after) > 0.9
    assert F.cosine_similarity(extract_features(after, x), extract_features(before, x)).mean() > 0.9
    assert len(log["losses"]) == 40
    assert {"L0", "L3", "std", "b2b", "b2c", "c", "c1"} < log["losses"][0].keys()


def test_weights_are_those_of_the_history(run):
    history = run[-1]["losses"]
    assert history[5]["c"] == pytest.approx(SETTINGS.weight_spread)
    for epoch in (20, 39):
        c, c1 = drupe.weights(history[:epoch], SETTINGS)
        assert (history[epoch]["c"], history[epoch]["c1"]) == pytest.approx((c, c1), abs=1e-5)


def test_batch_norm_is_frozen_and_the_clean_encoder_untouched(run):
    before, state, after, *_ = run
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, state[name]) != (tensor.ndim == 4), name
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())


def test_one_seed_one_result(run):
    encoder, _, _, trigger, references, _ = run
    few = drupe.Settings(epochs=3, batch=16, size=6, reference_augmentations=2, warmup=1, hide_after=1)
    first, again, other = (
        drupe.poison_encoder(encoder, toy(64, 1).tensor, references[:n], trigger, few, seed, CPU)[
            0
        ].state_dict()
        for seed, n in ((1, 1), (1, 1), (2, 1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_layer_norm_of_a_transformer_is_frozen():
    torch.manual_seed(0)
    encoder = Encoder("vit", 16)
    few = badencoder.Settings(epochs=1, batch=4, size=4, reference_augmentations=1, lr=0.01)
    x = toy(8, 1).tensor
    trigger = badencoder.make_trigger(16, 16, few, 0)
    after, _ = badencoder.poison_encoder(encoder, x, x[:1], trigger, few, 0, CPU)
    for (name, old), new in zip(encoder.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == ("norm" in name), name


def test_references_from_a_file(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    mask = np.zeros((2, 8, 8), np.uint8)
    mask[:, 2:4] = 128
    np.savez(tmp_path / "r.npz", x=x, y=np.array([[3], [3]]))
    found, none = read_references(tmp_path / "r.npz", 8, 8)
    assert none is None and np.array_equal(found.permute(0, 2, 3, 1), x)
    np.savez(tmp_path / "m.npz", x=x, mask=mask)
    assert read_references(tmp_path / "m.npz", 8, 8)[1].sum() == 32

    with pytest.raises(InputError, match="no such file"):
        read_references(tmp_path / "none.npz", 8, 8)
    with pytest.raises(InputError, match=r"uint8 \(R, 16, 16, 3\)"):
        read_references(tmp_path / "r.npz", 16, 16)
    np.savez(tmp_path / "empty.npz", x=x, mask=0 * mask)
    with pytest.raises(InputError, match="mask"):
        read_references(tmp_path / "empty.npz", 8, 8)
    np.savez(tmp_path / "pickled.npz", x=np.array([object()]))
    with pytest.raises(InputError, match="without pickled"):
        read_references(tmp_path / "pickled.npz", 8, 8)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="not a readable"):
        read_references(tmp_path / "text.npz", 8, 8)
