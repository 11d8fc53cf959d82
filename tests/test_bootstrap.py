"""Bootstrapping: what stays bit for bit, how the pool grows by hand, and who is let in on planted sets."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.channels import layers, norms_behind
from tcore.models.classifier import Classifier
from tcore.models.encoder import Encoder
from tcore.stages import bootstrap as stage

HEAD = heads.Settings(hidden=(32, 16), dropout=0.1)
SETTINGS = stage.Settings(
    rounds_class=2, rounds_all=2, gamma1=1 / 8, gamma2=1 / 4, gamma3=1 / 4, rho=0.9,
    epochs=2, epochs_meta=1, epochs_final=2, lr=0.01, batch=16,
)  # fmt: skip


class Toy(nn.Module):
    """Two convolutions with batch norm."""

    image_size, dim = 8, 16

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5), persistent=False)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x - self.mean)))
        return torch.relu(self.bn2(self.conv2(x))).mean((2, 3))


def encoder(seed: int = 0) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        toy = Toy()
        for norm in (toy.bn1, toy.bn2):
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.8, 1.2)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor, 0, 0.05)
    return toy.eval()


UNTRUSTED = {"conv1": torch.arange(8) < 2, "conv2": torch.arange(16) % 4 == 1}


def colours(labels: Tensor, spread: float, seed: int = 0) -> Tensor:
    """uint8 images (n, 3, 8, 8): a colour for each label, with noise."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8]])
    x = palette[labels].view(-1, 3, 1, 1) + spread * torch.randn(len(labels), 3, 8, 8, generator=generator)
    return (x.clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor]:
    """120 images of three classes of 60, 40 and 20, and a clean subset of every sixth."""
    labels = torch.tensor([0] * 60 + [1] * 40 + [2] * 20)
    return colours(labels, 0.2), labels, torch.arange(120) % 6 == 0


def run(data, settings=SETTINGS, seed: int = 0, core: Tensor | None = None):
    images, labels, subset = data
    core = torch.ones_like(subset) if core is None else core
    return stage.bootstrap(encoder(), images, labels, 3, subset, core, UNTRUSTED, settings, HEAD, seed)


def entries(module: nn.Module, name: str) -> dict[str, Tensor]:
    """A convolution's filters and their batch-norm entries, channels first."""
    norm = module.get_submodule(name.replace("conv", "bn"))
    names = ("weight", "bias", "running_mean", "running_var")
    return {"filters": module.get_submodule(name).weight} | {n: getattr(norm, n) for n in names}


# --- the parts ----------------------------------------------------------------------------------


def test_the_batch_norm_behind_each_convolution_of_a_resnet():
    resnet = Encoder("resnet18", 8)
    norms = norms_behind(resnet)
    expected = {"conv1": "bn1"}
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            expected |= {f"layer{layer}.{block}.conv{i}": f"layer{layer}.{block}.bn{i}" for i in (1, 2)}
        if layer > 1:
            expected[f"layer{layer}.0.downsample.0"] = f"layer{layer}.0.downsample.1"
    assert norms == {conv: resnet.get_submodule(norm) for conv, norm in expected.items()}


def test_restart_renews_the_untrusted_filters_and_nothing_else():
    before, after = encoder(), encoder()
    state = torch.random.get_rng_state()
    stage.restart(after, UNTRUSTED, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, bad in UNTRUSTED.items():
        old, new = entries(before, name), entries(after, name)
        for key in old:
            assert torch.equal(old[key][~bad], new[key][~bad])
        assert (old["filters"] != new["filters"])[bad].all()
        for key, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
            assert (new[key][bad] == value).all()
    again, other = encoder(), encoder()
    stage.restart(again, UNTRUSTED, seed=0)
    stage.restart(other, UNTRUSTED, seed=1)
    assert torch.equal(again.conv2.weight, after.conv2.weight)
    assert not torch.equal(other.conv2.weight, after.conv2.weight)


def test_fresh_filters_have_the_spread_of_he_initialisation():
    resnet = Encoder("resnet18", 8)
    flags = {n: torch.ones(len(m.weight), dtype=torch.bool) for n, m in norms_behind(resnet).items()}
    stage.restart(resnet, flags, seed=0)
    weight = resnet.layer3[1].conv1.weight  # 256 channels, 3x3: variance 2 / (256 x 9)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01)
    assert abs(weight.mean().item()) < 1e-3


def test_norms_are_measured_over_the_images(data):
    images, toy = data[0][:48], encoder()
    toy.bn2.momentum = 0.01  # as EfficientNet's
    before = copy.deepcopy(toy)
    stage.measure_norms(toy, images, UNTRUSTED, batch=16)
    x = images.double() / 255 - 0.5
    responses = F.conv2d(x, toy.conv1.weight.double(), padding=1).detach().numpy()
    parts = np.split(responses, 3)  # batches of 16, each counts the same
    mean = np.mean([part.mean((0, 2, 3)) for part in parts], axis=0)
    variance = np.mean([part.var((0, 2, 3), ddof=1) for part in parts], axis=0)
    bad = UNTRUSTED["conv1"].numpy()
    np.testing.assert_allclose(toy.bn1.running_mean[bad], mean[bad], atol=1e-5)
    np.testing.assert_allclose(toy.bn1.running_var[bad], variance[bad], rtol=1e-4)
    for name, flags in UNTRUSTED.items():
        old, new = entries(before, name), entries(toy, name)
        for key in old:
            assert torch.equal(old[key][~flags], new[key][~flags])
        assert (old["running_mean"] != new["running_mean"])[flags].all()
    assert (toy.bn1.momentum, toy.bn2.momentum) == (0.1, 0.01)


def test_gradients_reach_the_head_and_the_untrusted_channels_only(data):
    model = Classifier(encoder(), heads.new_head(16, 3, HEAD, 0))
    parameters = stage.trainable(model, UNTRUSTED)
    F.cross_entropy(model(data[0] / 255), data[1]).backward()
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    for name, bad in UNTRUSTED.items():
        for key in ("filters", "weight", "bias"):
            gradient = entries(model.encoder, name)[key].grad
            assert (gradient[~bad] == 0).all()
            assert gradient[bad].flatten(1 if key == "filters" else 0).abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.head.parameters())


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_norm", [True, False])
def test_trusted_channels_stay_bit_for_bit_and_untrusted_ones_change(data, frozen_norm):
    before, given = encoder(), encoder()
    images, labels, subset = data
    settings = replace(SETTINGS, frozen_norm=frozen_norm)
    model, _, _ = stage.bootstrap(
        given, images, labels, 3, subset, torch.ones_like(subset), UNTRUSTED, settings, HEAD, 0
    )
    assert not model.training
    for name, bad in UNTRUSTED.items():
        old, new, same = entries(before, name), entries(model.encoder, name), entries(given, name)
        for key in old:
            assert torch.equal(old[key], same[key]), "the encoder given was changed"
            if frozen_norm or not key.startswith("running"):  # otherwise statistics follow the data
                assert torch.equal(old[key][~bad], new[key][~bad]), (name, key)
            assert (old[key] != new[key])[bad].all()


def test_a_pool_by_hand(data):
    _, labels, subset = data
    _, pool, log = run(data)
    assert pool["index"].tolist() == list(range(120))
    assert (pool["round"] == 0).tolist() == subset.tolist()
    rest = [60 - 10, 40 - 7, 20 - 3]  # every sixth of 0 to 59, 60 to 99 and 100 to 119
    assert np.bincount(labels[subset]).tolist() == [10, 7, 3]
    sizes = [20]
    for number in (1, 2):  # phase 1: an eighth of each class, rounded up
        added = [math.ceil(r / 8) for r in rest]
        rest = [r - a for r, a in zip(rest, added, strict=True)]
        joined = labels[np.flatnonzero(pool["round"] == number)]
        assert joined.bincount(minlength=3).tolist() == added
        sizes.append(120 - sum(rest))
    left = sum(rest)
    while len(sizes) < 5 or 120 - left < 0.9 * 120:  # phases 2 and 3: a quarter of all, rounded up
        left -= math.ceil(left / 4)
        sizes.append(120 - left)
    assert log["pool"] == sizes
    assert [(pool["round"].between(0, n)).sum() for n in range(len(sizes))] == sizes
    phase = pool["round"].map(lambda n: 0 if n < 1 else 1 if n < 3 else 2 if n < 5 else 3)
    assert pool["phase"].tolist() == phase.tolist()
    assert (pool["round"] == -1).sum() == left


def test_phases_one_and_two_add_samples_of_the_core_alone(data):
    _, labels, subset = data
    core = torch.arange(120) % 3 == 0  # the subset is half of it: 10, 7 and 3 of 20, 14 and 6
    _, pool, _ = run(data, replace(SETTINGS, rounds_class=3), core=core)
    early = pool["phase"].isin((1, 2)).to_numpy()
    assert set(np.flatnonzero(early)) == set(np.flatnonzero((core & ~subset).numpy()))
    # An eighth of all that is outside, rounded up, until the core's have been added.
    for number, added in ((1, [7, 5, 3]), (2, [3, 2, 0]), (3, [0, 0, 0]), (4, [0, 0, 0]), (5, [0, 0, 0])):
        joined = labels[np.flatnonzero(pool["round"] == number)]
        assert joined.bincount(minlength=3).tolist() == added
    assert (pool["round"] == 6).sum() == 20  # phase 3, a quarter of the 80 outside
    _, free, _ = run(data, replace(SETTINGS, within_core=False), core=core)
    assert free.equals(run(data)[1])


def test_a_pool_that_is_full_ends_phases_one_and_two_too(data):
    settings = replace(SETTINGS, gamma1=1.0, within_core=False, rho=1.0)
    _, table, log = run(data, settings)
    assert log["pool"][-1] == len(table) and (table["round"] >= 0).all()
    assert table["phase"].max() == 1


def test_bootstrapping_depends_on_its_seed_alone(data):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    model, pool, log = run(data)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, same, log_again = run(data)
    assert pool.equals(same) and log == log_again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not run(data, seed=1)[1].equals(pool)


def test_by_its_loss_no_poison_is_let_in():
    """Phases 1 and 2, where a sixth of class 0 are images of classes 1 and 2 with a white square."""
    labels = torch.arange(180) % 3
    poison = torch.arange(180) % 10 == 9
    images = colours(labels, 0.15)
    images[poison, :, 4:, 4:] = 255
    target = torch.where(poison, 0, labels)
    subset = (torch.arange(180) < 40) & ~poison
    wrong = poison & (labels != 0)
    settings = replace(SETTINGS, rounds_all=5, rho=0.8, epochs=10)
    model, pool, _ = run((images, target, subset), settings)
    assert pool["phase"].max() == 2 and (pool["round"] >= 0).mean() > 0.8
    assert not (pool["round"] >= 0)[wrong.numpy()].any()
    with torch.no_grad():
        out = model(images / 255).argmax(1)
    assert (out == labels)[~poison].float().mean() > 0.95


def test_of_equally_wrong_samples_the_slow_to_learn_are_let_in_first():
    """The rest: 60 images of noise labelled at random and 60 white ones that all say class 0.

    To the model, trained on colours, both are new; a copy learns the white ones in an epoch, and of the
    noise nothing.
    """
    clean, rest = torch.arange(60) % 3, torch.zeros(120, dtype=torch.long)
    fast = torch.arange(120) % 2 == 0
    rest[~fast] = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))
    noise = torch.randint(0, 256, (120, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    noise[fast] = 255
    images, labels = torch.cat([colours(clean, 0.1), noise.to(torch.uint8)]), torch.cat([clean, rest])
    subset = torch.arange(180) < 60
    settings = replace(SETTINGS, rounds_class=0, rounds_all=0, gamma3=1 / 4, rho=0.5, epochs_meta=10)
    _, pool, _ = run((images, labels, subset), settings)
    joined = (pool["round"] == 1).to_numpy()[60:]
    assert joined.sum() == 30 and (joined & fast.numpy()).sum() <= 7  # by chance 15


@pytest.mark.parametrize(("steady", "score"), [(0.0, lambda a, b: a - b), (0.2, lambda a, b: a + abs(a - b))])
def test_phase_three_ranks_what_the_pool_lacks_by_model_and_copy(data, monkeypatch, steady, score):
    subset = data[2]
    before, after = torch.randn(2, 120, generator=torch.Generator().manual_seed(0)).abs()
    models = []

    def planted(model, images, labels, rows):
        models.append(copy.deepcopy(model.state_dict()))
        return (before, after)[(len(models) - 1) % 2][rows]

    monkeypatch.setattr(stage, "losses", planted)
    settings = replace(SETTINGS, rounds_class=0, rounds_all=0, rho=0.5, epochs_final=0, steady=steady)
    _, pool, _ = run(data, settings)
    rest = np.flatnonzero(~subset.numpy())
    order = rest[np.argsort(score(before, after).numpy()[rest])]
    assert set(np.flatnonzero(pool["round"] == 1)) == set(order[:25])  # a quarter of 100
    rest = order[25:]
    order = rest[np.argsort((before - after).numpy()[rest])]  # by now the pool is larger than `steady`
    assert set(np.flatnonzero(pool["round"] == 2)) == set(order[:19])  # a quarter of 75
    slow, fast = models[:2]
    for name, bad in UNTRUSTED.items():  # the copy was trained, and like the model on what is its to train
        key = f"encoder.{name}.weight"
        assert torch.equal(slow[key][~bad], fast[key][~bad]) and (slow[key] != fast[key])[bad].any()


def test_the_model_trains_on_crops_and_is_measured_on_whole_images_like_the_copy(data, monkeypatch):
    crops, seen, fit, losses, crop = [], [], stage.fit, stage.losses, stage.augment.resized_crop

    def cropped(x, generator, scale):
        crops.append(scale)
        return crop(x, generator, scale)

    def watched(model, optimizer, rows, images, labels, settings, *more, **named):
        before = len(crops)
        fit(model, optimizer, rows, images, labels, settings, *more, **named)
        steps = (more[3] if len(more) > 3 else 1) * -(-len(rows) // settings.batch)
        seen.append((settings.batch == 8, steps, len(crops) - before))

    def measured(*args):
        before = len(crops)
        found = losses(*args)
        assert len(crops) == before
        return found

    monkeypatch.setattr(stage.augment, "resized_crop", cropped)
    monkeypatch.setattr(stage, "fit", watched)
    monkeypatch.setattr(stage, "losses", measured)
    plain = replace(SETTINGS, batch_copy=8, rounds_class=1, rounds_all=0)
    settings = replace(plain, crop_min=0.5)
    pool = run(data, settings)[1]
    model, its_copy = ([(steps, n) for small, steps, n in seen if small is kind] for kind in (False, True))
    assert model and all(n == steps for steps, n in model)
    assert set(crops) == {(0.5, 1.0)}
    assert its_copy and all(steps and not n for steps, n in its_copy)
    assert run(data, settings)[1].equals(pool)
    crops.clear()
    run(data, plain)
    assert not crops


@pytest.mark.parametrize(
    "wrong", [{"crop_min": 0.0}, {"crop_min": 1.5}, {"steady": -0.1}, {"steady": 1.5}, {"rho": 1.5}]
)
def test_a_share_that_cannot_be_is_named(data, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"bootstrap.{name} = {value} should"):
        run(data, replace(SETTINGS, **wrong))


def test_without_the_copy_phase_three_ranks_by_the_loss_alone(data, monkeypatch):
    loss = torch.randn(120, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(stage, "losses", lambda model, images, labels, rows: loss[rows])
    settings = replace(SETTINGS, rounds_class=0, rounds_all=0, rho=0.3, epochs_final=0, guidance="loss")
    _, pool, _ = run(data, settings)
    rest = np.flatnonzero(~data[2].numpy())
    assert set(np.flatnonzero(pool["round"] == 1)) == set(rest[np.argsort(loss.numpy()[rest])[:25]])
    with pytest.raises(InputError, match=r"bootstrap.guidance = 'mata' should be one of"):
        run(data, replace(SETTINGS, guidance="mata"))


def test_shares_of_the_rest_or_of_the_whole_by_hand():
    labels = torch.tensor([0] * 8 + [1] * 4)
    pool = torch.tensor([True] * 6 + [False] * 6)  # outside: two of class 0, four of class 1
    score = torch.tensor([9.0] * 6 + [5, 1, 4, 3, 2, 6])
    for per_class, of_rest, expected in (
        (False, True, [7, 10, 9]),  # half of six
        (False, False, [7, 10, 9, 8, 6, 11]),  # half of twelve
        (True, True, [7, 10, 9]),  # half of two and of four
        (True, False, [7, 6, 10, 9]),  # half of eight is more than there is; half of four
    ):
        assert stage.best(score, labels, pool, ~pool, 0.5, per_class, of_rest).tolist() == expected
    candidates = torch.tensor([False] * 6 + [True, False, True, True, False, False])
    for per_class, expected in ((False, [9, 8, 6]), (True, [6, 9, 8])):  # half of six, of two and of four
        assert stage.best(score, labels, pool, candidates, 0.5, per_class).tolist() == expected


def test_batch_norm_entries_that_do_not_start_anew_stay_for_good(data):
    model, _, _ = run(data, replace(SETTINGS, restart_norm=False, epochs_final=1))
    before, after = encoder(), model.encoder
    for name in ("bn1", "bn2"):
        for entry in ("weight", "bias"):
            assert torch.equal(
                getattr(before.get_submodule(name), entry), getattr(after.get_submodule(name), entry)
            )
    for name, bad in UNTRUSTED.items():
        old, new = before.get_submodule(name).weight, after.get_submodule(name).weight
        assert torch.equal(old[~bad], new[~bad]) and (old != new)[bad].any()


def test_rows_of_a_transformers_linear_layers_stay_or_start_anew(data):
    images, labels, subset = data
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = Encoder("vit", 8)
    for norm in (m for m in vit.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.uniform_(norm.weight, 0.8, 1.2)
    untrusted = {name: torch.arange(len(layer.weight)) % 10 == 3 for name, layer in layers(vit).items()}
    settings = replace(SETTINGS, rounds_class=1, rounds_all=1, gamma2=0.9, epochs=1, epochs_final=1, lr=1e-3)
    model, _, _ = stage.bootstrap(
        vit, images, labels, 3, subset, torch.ones_like(subset), untrusted, settings, HEAD, 0
    )
    after = model.encoder
    for name, bad in untrusted.items():
        old, new = vit.get_submodule(name), after.get_submodule(name)
        assert torch.equal(old.weight[~bad], new.weight[~bad])
        assert (old.weight != new.weight)[bad].all()
        if old.bias is not None:
            assert torch.equal(old.bias[~bad], new.bias[~bad]) and (old.bias != new.bias)[bad].any()
    others = {name: p for name, p in vit.named_parameters() if name.rpartition(".")[0] not in untrusted}
    assert others and all(torch.equal(p, after.get_parameter(name)) for name, p in others.items())


def test_batch_norm_of_another_width_is_nobodys():
    # In a DenseNet the norm after a convolution sees what several layers have put side by side.
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(7), nn.Conv2d(7, 5, 1), nn.BatchNorm2d(5))
    assert norms_behind(dense) == {"2": dense[3]}
