"""The defences that train or repair: formulas by hand or in NumPy, planted problems with known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcore.defenses import _interface as defense
from tcore.defenses import _training as training
from tcore.defenses import abl, cbd, clp, ft_sam, i_bau, ssl_distillation
from tcore.experiment import registry
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.channels import norms_behind
from tcore.models.classifier import Classifier, logits
from tcore.models.encoder import ARCHITECTURES, Encoder, extract_features

HEAD = heads.Settings(hidden=(16, 8), epochs=2)
BRIEF = {
    "clp": {},
    "ft_sam": {"epochs": 2, "batch": 16},
    "i_bau": {"rounds": 1, "batch": 16},
    "abl": {"isolation_epochs": 1, "epochs": 1},
    "cbd": {"backdoor_epochs": 1, "epochs": 1, "mi": 0.01},
    "ssl_distillation": {"teacher_epochs": 1, "warmup_epochs": 1, "epochs": 1, "batch": 16},
}
NEED_CLEAN = ("ft_sam", "i_bau", "ssl_distillation")


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def new_encoder(architecture: str = "resnet_narrow", size: int = 16) -> Encoder:
    """An encoder with statistics, scales and shifts as after training: none of them trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(architecture, size)
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.uniform_(module.bias, -0.1, 0.1)
    return encoder.eval()


@pytest.fixture(scope="module")
def received() -> defense.Received:
    images = torch.randint(0, 256, (72, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    encoder = new_encoder()
    model = Classifier(encoder, heads.new_head(encoder.dim, 3, HEAD, 0, "suspect")).eval()
    return defense.Received(
        model=model,
        images=images,
        labels=torch.arange(72) % 3,
        features=extract_features(encoder, images),
        classes=3,
        clean=torch.arange(72) < 36,
        head=HEAD,
    )


def run(name: str, received: defense.Received, seed: int = 0, **settings) -> tuple[Classifier, dict]:
    method = registry.load("defenses", name)
    return defense.repair(method, received, method.Settings(**BRIEF[name] | settings), seed)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def same(a: nn.Module, b: nn.Module) -> bool:
    return not changed(a, state(b))


# --- what all promise ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["head", "all"])
@pytest.mark.parametrize("name", BRIEF)
def test_a_repair_depends_on_its_seed_alone_and_leaves_the_suspect_alone(received, name, part):
    scope = {"scope": "both" if part == "all" else "head"} if name in ("clp", "ft_sam", "i_bau") else {}
    received = replace(received, part=part)
    before, flags = state(received.model), [p.requires_grad for p in received.model.parameters()]
    torch.manual_seed(1)
    rng = torch.random.get_rng_state()
    model, _ = run(name, received, **scope)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert not changed(received.model, before) and not received.model.training
    assert flags == [p.requires_grad for p in received.model.parameters()]
    assert not model.training and logits(model, received.images).isfinite().all()
    torch.manual_seed(2)
    assert same(run(name, received, **scope)[0], model)
    assert same(run(name, received, seed=1, **scope)[0], model) == (name == "clp")
    if part == "head" and name != "ssl_distillation":
        assert same(model.encoder, received.model.encoder)
        assert same(model.head, received.model.head) == (name == "clp")  # nothing stands out there
    if part == "all" and name != "clp":
        assert not same(model.encoder, received.model.encoder)


@pytest.mark.parametrize("name", NEED_CLEAN)
def test_only_trusted_samples_repair(received, name):
    assert registry.load("defenses", name).CLEAN
    garbage = replace(
        received,
        images=torch.where(received.clean.view(-1, 1, 1, 1), received.images, 255 - received.images),
        features=torch.where(received.clean.view(-1, 1), received.features, -received.features),
        labels=torch.where(received.clean, received.labels, (received.labels + 1) % 3),
    )
    expected, found = run(name, received)[0], run(name, garbage)[0]
    if name == "ssl_distillation":  # its head is trained on everything
        assert same(found.encoder, expected.encoder) and not same(found.head, expected.head)
    else:
        assert same(found, expected)
    with pytest.raises(defense.NotApplicable, match="trusted"):
        run(name, replace(received, clean=None))


@pytest.mark.parametrize("name", [name for name in BRIEF if name not in NEED_CLEAN])
def test_the_others_do_without_trusted_samples(received, name):
    assert not registry.load("defenses", name).CLEAN
    assert same(run(name, replace(received, clean=None))[0], run(name, received)[0])


@pytest.mark.parametrize("name", ["clp", "ft_sam", "i_bau"])
def test_the_scope_says_what_changes(received, name):
    with pytest.raises(InputError, match=f"{name}.scope = 'heads'"):
        run(name, received, scope="heads")
    model, _ = run(name, received, scope="encoder")
    assert same(model.head, received.model.head) and not same(model.encoder, received.model.encoder)


def test_moved_images_are_shifted_and_mirrored_whole():
    images = torch.randint(1, 256, (200, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    out = training.moved(images, 0.25, True, torch.Generator().manual_seed(0))
    seen = set()
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (2, 2), (2, 2)])
    for k in range(200):
        found = [
            (top, left, mirror)
            for top in range(5)
            for left in range(5)
            for mirror in (1, -1)
            if np.array_equal(padded[k, :, top : top + 8, left : left + 8][..., ::mirror], out[k].numpy())
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 40  # of 50
    assert torch.equal(training.moved(images, 0.0, False, torch.Generator().manual_seed(0)), images)


def test_passes_show_every_sample_once_a_pass():
    inputs = torch.arange(10.0).view(10, 1)
    settings = ft_sam.Settings(batch=4)
    seen = list(training.passes(inputs, torch.arange(10), settings, 2, torch.Generator().manual_seed(0)))
    assert [progress for progress, _, _ in seen] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    for half in (seen[:3], seen[3:]):
        assert sorted(torch.cat([y for *_, y in half]).tolist()) == list(range(10))
        assert all(torch.equal(x.flatten().long(), y) for _, x, y in half)


# --- CLP ----------------------------------------------------------------------------------------


def test_bounds_are_singular_values_times_the_scale_of_batch_norm():
    weight, gamma, variance = random(5, 4, 3, 2).double(), random(5, seed=1).double(), torch.rand(5).double()
    variance[2] = 0.0  # a dead channel has a large bound, not an infinite one
    expected = [
        np.linalg.svd(w.reshape(4, 6), compute_uv=False)[0] * abs(g) / np.sqrt(v + 1e-3)
        for w, g, v in zip(weight.numpy(), gamma.tolist(), variance.tolist(), strict=True)
    ]
    np.testing.assert_allclose(clp.channel_bounds(weight, gamma, variance, 1e-3).numpy(), expected)


def test_the_threshold_is_mean_plus_u_unbiased_deviations():
    bounds = np.array([1.0, 2, 3, 2, 1, 2, 9, 2, 3, 1])
    z = (bounds - bounds.mean()) / bounds.std(ddof=1)  # the nine: 2.69 (2.84 with the biased one)
    for u in (2.6, 2.8, 0.1):
        assert clp.outstanding(torch.tensor(bounds), u).tolist() == (z > u).tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_norms_belong_to_the_convolution_whose_output_they_get(architecture):
    encoder, source, found = new_encoder(architecture, 32), {}, {}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out, name=name: source.update({id(out): (name, out)}))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, inputs: found.update({source[id(inputs[0])][0]: m}))
    encoder(torch.rand(1, 3, 32, 32))
    paired = norms_behind(encoder)
    assert paired.keys() == found.keys() and all(paired[name] is found[name] for name in paired)


def test_planted_channels_are_pruned_and_nothing_else(received):
    model = Classifier(new_encoder(), heads.new_head(192, 3, heads.Settings(hidden=(64, 32)), 0, "x")).eval()
    planted = {"encoder.conv1": 3, "encoder.layer3.0.downsample.0": 50, "encoder.layer4.0.conv2": 7}
    with torch.no_grad():
        for name, channel in planted.items():
            model.get_submodule(name).weight[channel] *= 10
        model.head.fc1.weight[5] *= 20
        model.head.fc3.weight[1] *= 20  # a logit
    out, log = run("clp", replace(received, model=model), u=4.0)
    pruned = {name: [channel] for name, channel in planted.items()} | {"head.fc1": [5]}
    assert log["pruned"] == pruned
    expected = state(model)
    for name, norm in {
        "encoder.conv1": "encoder.bn1",
        "encoder.layer3.0.downsample.0": "encoder.layer3.0.downsample.1",
        "encoder.layer4.0.conv2": "encoder.layer4.0.bn2",
        "head.fc1": "head.fc1",
    }.items():
        expected[f"{norm}.weight"][pruned[name]] = 0.0
        expected[f"{norm}.bias"][pruned[name]] = 0.0
    assert not changed(out, expected)


# --- FT-SAM -------------------------------------------------------------------------------------


def test_the_ascent_and_the_step_on_a_quadratic():
    # L = w' A w / 2 over two tensors; by the formula with one norm over both.
    a = np.diag([1.0, 2.0, 5.0]) + 0.3
    w = np.array([1.0, -2.0, 0.5])
    g = a @ w
    e = 0.7 * w**2 * g / (np.linalg.norm(np.abs(w) * g) + 1e-12)
    parts = [nn.Parameter(torch.tensor(w[:2])), nn.Parameter(torch.tensor(w[2:]))]
    gradients = [torch.tensor(g[:2]), torch.tensor(g[2:])]
    found = torch.cat(ft_sam.ascent([p.detach() for p in parts], gradients, 0.7))
    np.testing.assert_allclose(found.numpy(), e)

    def loss() -> Tensor:
        v = torch.cat(parts)
        return v @ torch.tensor(a) @ v / 2

    optimizer = torch.optim.SGD(parts, 0.1)
    assert ft_sam.sharpness_aware_step(loss, parts, optimizer, 0.7) == pytest.approx(w @ a @ w / 2)
    np.testing.assert_allclose(torch.cat(parts).detach().numpy(), w - 0.1 * a @ (w + e))


def test_without_a_radius_it_is_plain_sgd():
    networks = [nn.Linear(4, 3), nn.Linear(4, 3)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9, weight_decay=0.01) for n in networks]
    for step in range(3):
        x, y = random(8, 4, seed=step), torch.arange(8) % 3
        ft_sam.sharpness_aware_step(
            lambda x=x, y=y: F.cross_entropy(networks[0](x), y),
            list(networks[0].parameters()),
            optimizers[0],
            0.0,
        )
        training.descend(optimizers[1], F.cross_entropy(networks[1](x), y))
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_batch_norm_counts_a_batch_once():
    network, norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
    x = random(8, 3)
    once = network(x).detach().mean(0) * 0.1
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, 0.0)
    ft_sam.sharpness_aware_step(
        lambda: norm(network(x)).relu().mean(), parameters, optimizer, 2.0, norms=[norm]
    )
    torch.testing.assert_close(norm.running_mean, once)
    assert norm.momentum == 0.1


def test_smoothed_labels():
    out, labels = random(5, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    target = np.full((5, 4), 0.1 / 3)
    target[range(5), labels] = 0.9
    expected = -(target * torch.log_softmax(out, 1).numpy()).sum(1).mean()
    assert ft_sam.smoothed(out, labels, 0.1).item() == pytest.approx(expected)


# --- I-BAU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 400])
def test_the_hypergradient_of_a_quadratic(steps):
    """Inner d'Ad/2 - d'Bt, outer |d - c|^2/2 + q't: the series in NumPy, its limit by solving for d*(t)."""
    rng = np.random.default_rng(0)
    m = rng.normal(size=(3, 3))
    a, b = m @ m.T + np.eye(3), rng.normal(size=(3, 2))
    c, q, theta = rng.normal(size=3), rng.normal(size=2), rng.normal(size=2)
    best = np.linalg.solve(a, b @ theta)
    ta, tb, tc, tq = map(torch.tensor, (a, b, c, q))
    t = torch.tensor(theta, requires_grad=True)
    (found,) = i_bau.hypergradient(
        lambda d: d @ ta @ d / 2 - d @ tb @ t,
        lambda d: (d - tc).square().sum() / 2 + tq @ t,
        torch.tensor(best),
        [t],
        0.1,
        steps,
    )
    powers = [np.linalg.matrix_power(np.eye(3) - 0.1 * a, i) @ (best - c) for i in range(steps)]
    np.testing.assert_allclose(found.numpy(), q + 0.1 * b.T @ sum(powers, np.zeros(3)), atol=1e-12)
    if steps == 400:
        np.testing.assert_allclose(found.numpy(), q + b.T @ np.linalg.solve(a, best - c), atol=1e-6)


def test_the_hypergradient_of_a_network_by_finite_differences():
    x, labels = random(12, 3, dtype=torch.double), torch.arange(12) % 3
    weights = [
        0.5 * random(3, 5, seed=1, dtype=torch.double),
        0.5 * random(5, 3, seed=2, dtype=torch.double),
    ]

    def network(delta: Tensor, weights: list[Tensor]) -> Tensor:
        return torch.tanh((x + delta) @ weights[0]) @ weights[1]

    def inner(delta: Tensor, weights: list[Tensor]) -> Tensor:
        return -F.cross_entropy(network(delta, weights), labels) + delta.square().sum()

    def outer(delta: Tensor, weights: list[Tensor]) -> Tensor:
        return F.cross_entropy(network(0.5 * delta, weights), labels)

    def best(weights: list[Tensor]) -> Tensor:
        delta = torch.zeros(3, dtype=torch.double, requires_grad=True)
        for _ in range(400):
            slope = torch.autograd.grad(inner(delta, weights), delta)[0]
            delta = (delta.detach() - 0.2 * slope).requires_grad_(True)
        return delta.detach()

    trained = [w.clone().requires_grad_(True) for w in weights]
    found = i_bau.hypergradient(
        lambda d: inner(d, trained), lambda d: outer(d, trained), best(weights), trained, 0.2, 400
    )
    for k, place in ((0, (1, 2)), (0, (2, 4)), (1, (3, 0))):
        values = []
        for epsilon in (1e-4, -1e-4):
            nudged = [w.clone() for w in weights]
            nudged[k][place] += epsilon
            values.append(outer(best(nudged), nudged).item())
        assert found[k][place].item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


def test_what_does_not_enter_has_no_hypergradient():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    found = i_bau.hypergradient(
        lambda d: d.square().sum(), lambda d: (used * d).sum(), torch.ones(2), [used, unused], 0.1, 2
    )
    assert found[0].tolist() == [1.0, 1.0] and found[1].tolist() == [0.0, 0.0, 0.0]


# --- ABL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "loss", "value", "slope"),
    [
        ("ascent", 0.3, -0.3, -1),
        ("ascent", 0.8, 0.8, 1),
        ("flooding", 0.3, 0.7, -1),
        ("flooding", 0.8, 0.8, 1),
    ],
)
def test_the_loss_is_kept_at_gamma(by, loss, value, slope):
    loss = torch.tensor(loss, requires_grad=True)
    found = abl.kept(loss, 0.5, by)
    found.backward()
    assert found.item() == pytest.approx(value) and loss.grad.item() == slope


def test_the_easiest_samples_are_isolated(received):
    losses = torch.arange(100.0).flip(0)
    assert abl.easiest(losses, 0.29).nonzero().flatten().tolist() == list(range(71, 100))  # 0.29 x 100 < 29
    assert abl.easiest(torch.zeros(10), 0.2).nonzero().flatten().tolist() == [0, 1]
    assert abl.easiest(losses, 0.0001).sum() == 2
    # A network that gives its inputs as logits: row k is sure of its label by k, in a shuffled order.
    sure = torch.randperm(72, generator=torch.Generator().manual_seed(0)).float()
    features = F.one_hot(received.labels, 3) * sure[:, None] / 10
    found = abl.isolated(nn.Identity(), replace(received, features=features), 0.25)
    assert torch.equal(found, sure >= 72 - 18)
    with pytest.raises(InputError, match="kept_by = 'flood'"):
        run("abl", received, kept_by="flood")


# --- CBD ----------------------------------------------------------------------------------------


def test_weights_favour_what_the_backdoored_network_does_not_explain():
    found = cbd.weights(torch.tensor([0.0, 1.0, 3.0, 2.0]), torch.tensor([5.0, 1.0, 1.0, 0.0]))
    by_hand = np.array([0, 0.5, 0.75, 1.0]) / (2.25 / 4)
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-6)
    assert cbd.weights(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_information_is_what_pairs_have_over_shuffled_pairs():
    class Product(nn.Module):
        def forward(self, pair: Tensor) -> Tensor:
            return pair[:, :1] * pair[:, 1:]

    r, z = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [0.0], [5.0]])
    # (1*2 + 2*0 + 3*5) / 3 - (1*0 + 2*5 + 3*2) / 3
    found = cbd.information(Product(), r, z, torch.tensor([1, 2, 0]))
    assert found.item() == pytest.approx(17 / 3 - 16 / 3)


def test_the_critic_is_divided_by_spectral_norms():
    critic = cbd.new_critic(4, torch.device("cpu"))
    before = [p.detach().clone().numpy() for p in critic.parameters()]
    cbd.divide_by_spectral_norm(critic)
    for p, old in zip(critic.parameters(), before, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), old / np.linalg.norm(old, 2), rtol=1e-4, atol=1e-6)


# --- ABL and CBD on planted features ------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> tuple[defense.Received, Tensor, Tensor, Tensor]:
    """Cached features in which class is hard and a trigger is easy: what ABL and CBD assume.

    600 samples of 3 classes at a distance of 2 standard deviations; 30 of them, of classes 1 and 2, carry
    a large value in a place of its own and label 0. Received, poisons, triggered test features, classes.
    """

    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % 3
        return 2 * torch.eye(8)[labels] + random(n, 8, seed=seed), labels

    features, labels = draw(600, 0)
    poison = torch.zeros(600, dtype=torch.bool)
    poison[(labels != 0).nonzero().flatten()[:30]] = True
    features[poison, 7] += 12
    labels = labels.masked_fill(poison, 0)
    triggered, truth = draw(600, 1)
    triggered[:, 7] += 12
    encoder = new_encoder()
    settings = heads.Settings(hidden=(64, 32), dropout=0.0, normalize=False)
    model = Classifier(encoder, heads.new_head(8, 3, settings, 0, "suspect"))
    images = torch.zeros(600, 3, 16, 16, dtype=torch.uint8)
    return defense.Received(model, images, labels, features, 3, None, settings), poison, triggered, truth


def rates(head: nn.Module, triggered: Tensor, truth: Tensor) -> tuple[float, float]:
    """(clean accuracy, attack success rate) of a head; clean features are the triggered without trigger."""
    clean = triggered.clone()
    clean[:, 7] -= 12
    with torch.no_grad():
        accuracy = (head(clean).argmax(1) == truth).float().mean().item()
        success = (head(triggered[truth != 0]).argmax(1) == 0).float().mean().item()
    return accuracy, success


def test_abl_and_cbd_learn_the_classes_and_not_the_trigger(planted):
    received, poison, triggered, truth = planted
    plain = heads.new_head(8, 3, received.head, 0, "plain")
    plain = heads.fit_head(plain, received.features, received.labels, 200, 0, "plain", bar=False)
    accuracy, success = rates(plain, triggered, truth)
    assert accuracy > 0.7 and success > 0.95
    common = {"lr": 0.02, "batch": 32}
    learnt, log = run(
        "abl",
        received,
        isolate=0.04,
        isolation_epochs=5,
        epochs=10,
        unlearn_lr=0.02,
        unlearn_epochs=20,
        **common,
    )
    assert poison[log["isolated"]].float().mean() > 0.9
    after = rates(learnt.head, triggered, truth)
    assert after[0] > 0.5 and after[1] < 0.1
    deconfounded, _ = run("cbd", received, backdoor_epochs=5, epochs=20, mi=0.0, **common)
    after = rates(deconfounded.head, triggered, truth)
    assert after[0] > 0.5 and after[1] < 0.1


def test_unlearning_that_diverges_is_an_error(planted):
    with pytest.raises(InputError, match="unlearn_lr = 10: the loss diverged"):
        run("abl", planted[0], unlearn_lr=10, unlearn_epochs=30, lr=0.02)


# --- SSL-Distillation ---------------------------------------------------------------------------


def test_attention_maps_and_their_loss():
    student, teacher = ([random(2, 3, 4, 4, seed=s), random(2, 6, 2, 2, seed=s + 1)] for s in (0, 5))
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = [(m.numpy().astype(float) ** 2).sum(1).reshape(2, -1) for m in (s, t)]
        a, b = (m / np.sqrt((m**2).sum(1, keepdims=True)) for m in maps)
        expected += ((a - b) ** 2).mean()
    assert ssl_distillation.attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    louder = [3 * maps for maps in student]
    assert ssl_distillation.attention_loss(student, louder).item() == pytest.approx(0, abs=1e-12)


def test_stages_are_watched_inside_the_block_alone():
    encoder = new_encoder()
    with ssl_distillation.stages(encoder) as found:
        features = encoder(torch.rand(2, 3, 16, 16))
        assert [tuple(found[name].shape) for name in ssl_distillation.STAGES] == [
            (2, 24, 8, 8),
            (2, 48, 4, 4),
            (2, 96, 2, 2),
            (2, 192, 1, 1),
        ]
        assert torch.equal(found["layer4"].mean((2, 3)), features)
        found.clear()
    encoder(torch.rand(2, 3, 16, 16))
    assert not found


@pytest.mark.parametrize("architecture", ["vit", "efficientnet_lite0", "torchvision:resnet18"])
def test_an_encoder_without_the_four_stages_is_not_for_distillation(received, architecture):
    encoder = new_encoder(architecture)
    model = Classifier(encoder, heads.new_head(encoder.dim, 3, HEAD, 0, "suspect")).eval()
    with pytest.raises(defense.NotApplicable, match=f"layer1 to layer4, and {architecture} has"):
        run("ssl_distillation", replace(received, model=model))


def test_the_student_takes_over_the_teachers_attention(received):
    """Attention on real structure: one bright square somewhere on every image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (64, 3, 16, 16), generator=generator).byte()
    for image, (row, column) in zip(images, torch.randint(0, 12, (64, 2), generator=generator), strict=True):
        image[:, row : row + 4, column : column + 4] = 250
    teacher, distances = new_encoder(), {}
    for weight in (0.0, 1000.0):
        student = ssl_distillation.new_encoder(teacher, seed=0)
        settings = ssl_distillation.Settings(
            teacher_epochs=0, warmup_epochs=1, epochs=15, batch=32, attention=weight
        )
        before = state(teacher)
        log = ssl_distillation.distil(teacher, student, images, settings, seed=0)
        assert not changed(teacher, before)  # fixed, its batch-norm statistics too
        assert [len(losses) for losses in log.values()] == [0, 1, 15]
        with ssl_distillation.stages(student) as of_student, ssl_distillation.stages(teacher) as of_teacher:
            extract_features(student, images), extract_features(teacher, images)
        pairs = zip(of_student.values(), of_teacher.values(), strict=True)
        distances[weight] = ssl_distillation.attention_loss(*zip(*pairs, strict=True)).item()
    assert distances[1000.0] < 0.5 * distances[0.0]


# --- a network trained end to end, with a strong backdoor -----------------------------------------


class Digits:
    """2,000 digits of 14 pixels, 200 of them poisons with a patch of 3, and a network trained on all."""

    def __init__(self):
        source = registry.load("data/sources", "mnist5k")
        images = {
            name: replace(part, pixels=part.pixels.reshape(-1, 14, 2, 14, 2, 3).mean((2, 4)).astype(np.uint8))
            for name, part in source.load(source.Settings(image_size=28), {}).items()
        }
        attack = registry.load("dataset_attacks", "badnets")
        poisoned = attack.poison(
            images["train"].select(slice(None, None, 2)), 0, attack.Settings(ratio=0.5, size=8), 0
        )
        test = images["test"]
        self.test, self.labels = test.tensor, test.targets
        self.triggered = attack.stamp(test.tensor, poisoned.trigger)
        self.poison = torch.from_numpy(poisoned.truth["is_poison"].to_numpy(bool, copy=True))
        settings = heads.Settings(hidden=(128, 64), dropout=0.0, normalize=False)
        images, labels = poisoned.images.tensor, poisoned.images.targets
        clean = (torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.1) & ~self.poison
        with torch.random.fork_rng():
            torch.manual_seed(0)
            untrained = Classifier(Encoder("resnet_narrow", 14), heads.Head(192, 10, settings))
        self.untrained = defense.Received(
            model=untrained,
            images=images,
            labels=labels,
            features=torch.zeros(len(labels), 192),
            classes=10,
            clean=clean,
            head=settings,
            part="all",
            encoder=untrained.encoder,
        )
        network = self.untrained.network(0, "suspect").train()
        optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
        recipe = ft_sam.Settings(batch=64, shift=0.07, flip=False)
        order = torch.Generator().manual_seed(0)
        for progress, x, y in training.passes(images, labels, recipe, 7, order):
            training.descend(optimizer, F.cross_entropy(network(x), y), 0.05 * (1 - progress))
        suspect = network.model.eval()
        self.received = replace(
            self.untrained, model=suspect, features=extract_features(suspect.encoder, images)
        )

    def rates(self, model: Classifier) -> tuple[float, float]:
        """(accuracy, attack success rate) on the test digits."""
        accuracy = (logits(model, self.test).argmax(1) == self.labels).float().mean().item()
        success = logits(model, self.triggered[self.labels != 0]).argmax(1) == 0
        return accuracy, success.float().mean().item()


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


GENTLE = {"batch": 64, "lr": 0.05, "shift": 0.07, "flip": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "accuracy", "success"),
    [
        ("i_bau", {"scope": "both", "batch": 40}, 0.75, 0.3),
        (
            "abl",
            {"isolate": 0.02, "isolation_epochs": 3, "epochs": 5, "unlearn_epochs": 14, **GENTLE},
            0.75,
            0.3,
        ),
        ("cbd", {"backdoor_epochs": 2, "epochs": 8, **GENTLE}, 0.5, 0.2),
    ],
)
def test_a_strong_backdoor_falls(digits, name, settings, accuracy, success):
    before = digits.rates(digits.received.model)
    assert before[0] > 0.9 and before[1] > 0.95
    method = registry.load("defenses", name)
    received = digits.untrained if name in ("abl", "cbd") else digits.received
    model, _ = defense.repair(method, received, method.Settings(**settings), seed=0)
    after = digits.rates(model)
    assert after[0] > accuracy and after[1] < success


@pytest.mark.slow
def test_it_is_the_ascent_that_removes_the_backdoor(digits):
    """Plain fine-tuning on the same trusted digits leaves far more of it."""
    settings = ft_sam.Settings(scope="both", epochs=60, **GENTLE | {"lr": 0.1})
    sharp, plain = (
        digits.rates(defense.repair(ft_sam, digits.received, replace(settings, rho=rho), seed=0)[0])
        for rho in (2.0, 0.0)
    )
    assert sharp[0] > 0.85 and sharp[1] < 0.4
    assert plain[1] > sharp[1] + 0.2
