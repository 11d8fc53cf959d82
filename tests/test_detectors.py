"""Each detector on problems with a known answer, and its formulas evaluated another way."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tcore.defenses import ac, asset, ct, ibd_psc, meta_sift, scale_up, spectral, spectre, strip
from tcore.defenses._interface import Received
from tcore.evaluation import metrics
from tcore.models import head as heads
from tcore.models.classifier import Classifier, logits
from tcore.models.encoder import Encoder, floats

HEAD = heads.Settings(hidden=(64, 32), dropout=0.0, lr=3e-3, batch=64, epochs=20, normalize=False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussians(poisons: int = 20, distance: float = 6.0, classes: int = 3, each: int = 400):
    """Received features of Gaussian classes in 32 dimensions, and who is poison.

    Poisons are labelled 0; what they look like is a class of theirs, at `distance` from class 0's centre.
    """
    labels = torch.arange(classes * each) % classes
    centres = 8 * torch.eye(32)[:classes]
    poison = torch.zeros(len(labels), dtype=torch.bool)
    poison[(labels == 0).nonzero().flatten()[:poisons]] = True
    features = centres[labels] + normal(len(labels), 32)
    features[poison] += distance * torch.eye(32)[20]
    head = heads.new_head(32, classes, HEAD, 0, "head")
    model = SimpleNamespace(head=head, eval=lambda: SimpleNamespace(head=head))
    received = Received(model, torch.zeros(len(labels), 3, 1, 1), labels, features, classes, None, HEAD)
    return received, poison


def rates(found: Tensor, poison: Tensor) -> tuple[float, float]:
    return found[poison].float().mean().item(), found[~poison].float().mean().item()


def auroc(score: Tensor, poison: Tensor) -> float:
    return metrics.auroc(score.numpy(), poison.numpy())


# --- activation clustering, spectral signatures, SPECTRE ----------------------------------------


@pytest.mark.parametrize("poisons", [20, 100])
def test_ac_finds_the_planted_cluster_and_nothing_in_clean_classes(poisons):
    received, poison = gaussians(poisons)
    settings = ac.Settings(layer="encoder")
    score = ac.score(received, settings, 0)
    tpr, fpr = rates(ac.flag(score, received, settings), poison)
    assert tpr > 0.95 and fpr < 0.05
    own = received.labels == 0
    assert auroc(score[own], poison[own]) > 0.99


def test_ac_score_is_the_signed_distance_to_two_centres():
    received, _ = gaussians(60, distance=12)
    rows = received.labels == 0
    x = received.features[rows].double()
    x = x - x.mean(0)
    x = x @ torch.from_numpy(np.linalg.svd(x.numpy(), full_matrices=False)[2][:10].T)
    inside = torch.zeros(len(x), dtype=torch.bool)
    inside[:60] = True  # k-means finds the planted ones (above), so the centres are known
    a, b = x[~inside].mean(0), x[inside].mean(0)
    expected = ((x - a).square().sum(1) - (x - b).square().sum(1)) / (a - b).square().sum()
    found = ac.score(received, ac.Settings(layer="encoder"), 0)[rows]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_ac_flags_no_cluster_of_a_third_or_more():
    received, _ = gaussians(0)
    score = -torch.ones(1200)
    own = (received.labels == 1).nonzero().flatten()
    score[own[:139]] = 1.0
    assert ac.flag(score, received, ac.Settings()).sum() == 139  # 139 < 0.35 * 400
    score[own[139]] = 1.0
    assert ac.flag(score, received, ac.Settings()).sum() == 0


def test_ac_copes_with_classes_of_one_and_of_equal_samples():
    received, _ = gaussians(0)
    labels = torch.where(torch.arange(1200) == 5, 2, torch.arange(1200) % 2)
    features = received.features.clone()
    features[labels == 1] = 1.0
    score = ac.score(replace(received, labels=labels, features=features), ac.Settings(layer="encoder"), 0)
    assert (score[labels > 0] < 0).all() and score.isfinite().all()


def test_spectral_finds_the_planted_cluster():
    received, poison = gaussians(20)
    settings = spectral.Settings(layer="encoder", poison_rate=20 / 1200)
    score = spectral.score(received, settings, 0)
    found = spectral.flag(score, received, settings)
    assert rates(found, poison)[0] > 0.95
    assert found.sum() == 3 * 30  # 1.5 * 20 in every class: false alarms are the budget's
    assert auroc(score, poison) > 0.95
    rows = (received.labels == 0).numpy()
    x = received.features.numpy()[rows].astype(float)
    x = x - x.mean(0)
    np.testing.assert_allclose(score.numpy()[rows], (x @ np.linalg.svd(x)[2][0]) ** 2, rtol=1e-6)


@pytest.mark.parametrize("method", [spectral, spectre])
def test_the_papers_budget_in_its_setting(method):
    # T-Core's table 2: 1,250 poisons among 50,000 samples of 10 classes, and 18,750 flagged
    labels = torch.arange(50_000) % 10
    received = SimpleNamespace(labels=labels, classes=10)
    settings = method.Settings(poison_rate=0.025)
    assert method.flag(normal(50_000).square(), received, settings).sum() == 18_750


def test_spectre_finds_the_planted_cluster():
    received, poison = gaussians(20)
    settings = spectre.Settings(layer="encoder", poison_rate=20 / 1200, suspects="worst")
    score = spectre.score(received, settings, 0)
    tpr, fpr = rates(spectre.flag(score, received, settings), poison)
    assert tpr > 0.95 and fpr < 0.05
    for suspects, classes in (("all", 3), ("median", 1)):
        found = spectre.flag(score, received, replace(settings, suspects=suspects))
        assert found.sum() == classes * 30 and rates(found, poison)[0] > 0.95


def test_spectre_finds_what_a_wide_clean_direction_hides_from_spectral_signatures():
    received, poison = gaussians(20)
    features = received.features.clone()
    features[:, 25] *= 12  # clean variance far above what the poisons add
    received = replace(received, features=features)
    own = received.labels == 0
    plain = spectral.score(received, spectral.Settings(layer="encoder"), 0)[own]
    robust = spectre.score(received, spectre.Settings(layer="encoder", poison_rate=20 / 1200), 0)[own]
    assert auroc(plain, poison[own]) < 0.8
    assert auroc(robust, poison[own]) > 0.95


def test_the_entropy_score_takes_a_true_matrix_exponential():
    covariance = torch.tensor([[2.0, 0.7, 0.1], [0.7, 1.5, -0.4], [0.1, -0.4, 1.0]], dtype=torch.float64)
    largest = np.linalg.eigvalsh(covariance.numpy())[-1]
    exponent = 4 * (covariance.numpy() - np.eye(3)) / (largest - 1)
    expected = scipy.linalg.expm(exponent)
    found = spectre.entropy_weights(covariance, 4.0).numpy()
    np.testing.assert_allclose(found, expected / np.trace(expected), rtol=1e-10)
    wrong = np.exp(exponent)
    assert abs(found - wrong / np.trace(wrong)).max() > 0.05


def test_whitened_points_have_unit_second_moment():
    points = normal(500, 6).double() @ normal(6, 6, seed=1).double()
    white = points @ spectre.whitener(points)
    torch.testing.assert_close(white.T @ white / 500, torch.eye(6, dtype=torch.float64))


def test_the_widest_quadratic_is_that_of_the_fourth_moment_operator():
    points = normal(400, 4).double()
    points[:40, 0] *= 4
    flat = torch.stack([p.outer(p).flatten() for p in points])
    values, vectors = np.linalg.eigh(np.cov(flat.numpy().T, bias=True))
    found = spectre.widest(points, steps=500, tolerance=1e-6)
    assert abs((found.flatten().numpy() * vectors[:, -1]).sum()) == pytest.approx(1, abs=1e-4)
    assert spectre.quadratic(points, found).var(correction=0).item() == pytest.approx(values[-1], rel=1e-4)


def test_the_tail_is_cut_where_too_many_lie_beyond():
    rate = 0.1  # T counts from 10 ln 10 = 23.03 on; beyond T = 30 at most 3e-1 / (30 ln 30)^2 = 2.9e-5
    deviation = torch.cat([torch.linspace(0, 10, 990), torch.full((10,), 33.5)])
    assert spectre.tail_cut(deviation, rate).sum() == 10
    assert spectre.tail_cut(deviation.clamp(max=26), rate).sum() == 0  # T = 23 is still allowed


def test_outliers_do_not_move_the_robust_covariance():
    points = normal(1000, 4).double()
    points[:3] += 60
    clean = spectre.whitener(points[3:])
    robust = spectre.robust_whitener(points, 0.003, 6)
    assert (robust - clean).abs().max() < 0.05 < (spectre.whitener(points) - clean).abs().max()


# --- STRIP, SCALE-UP, IBD-PSC -------------------------------------------------------------------


class Colours(nn.Module):
    """Names the strongest of three colours, but 0 where the corner is bright: softly, by `sharp`."""

    def __init__(self, sharp: float = 6.0):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.image_size = 8
        self.encoder.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.sharp = sharp

    def forward(self, x: Tensor) -> Tensor:
        bright = (x[:, :, :2, :2].mean((1, 2, 3)) > 0.7).float()
        return self.sharp * x[:, :, 2:, 2:].mean((2, 3)) + 50 * bright[:, None] * torch.eye(3)[0]


def coloured(n: int = 180, poisons: int = 20) -> tuple[Received, Tensor]:
    labels = torch.arange(n) % 3
    images = (torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 100).to(torch.uint8)
    images[torch.arange(n), labels] += 60
    poison = torch.arange(n) < poisons
    images[poison, :, :2, :2] = 255
    labels = torch.where(poison, 0, labels)
    clean = torch.arange(n) >= n - 90
    features = images.float().mean((2, 3))
    return Received(Colours(), images, labels, features, 3, clean, HEAD), poison


def test_strip_finds_a_trigger_that_decides_alone():
    received, poison = coloured()
    settings = strip.Settings(overlays=16)
    score = strip.score(received, settings, 0)
    found = strip.flag(score, received, settings)
    tpr, fpr = rates(found, poison)
    assert tpr == 1 and fpr < 0.12
    assert auroc(score, poison) == 1


def test_strip_is_the_mean_entropy_over_overlays_other_than_itself():
    received, _ = coloured()
    settings = strip.Settings(overlays=7, alpha=0.3, batch=50)
    rows = strip.chosen(received, settings, 4)
    assert len(rows.unique()) == 7 and received.clean[rows].all()
    score = strip.score(received, settings, 4).numpy()
    pixels = received.images.double() / 255
    checked = [0, 1, *rows.tolist()]
    for i in checked:
        values = []
        for j in rows.tolist():
            if i == j:
                continue
            out = received.model((pixels[i] + 0.3 * (pixels[j] - 0.5))[None].float())[0].double().numpy()
            p = np.exp(out - out.max()) / np.exp(out - out.max()).sum()
            values.append(-(p * np.log(p + 1e-300)).sum())
        assert -score[i] == pytest.approx(np.mean(values), abs=1e-5)
    inputs = strip.score_inputs(received.images[:60], received, settings, 4)
    np.testing.assert_allclose(inputs.numpy(), score[:60], rtol=1e-5)
    assert -strip.score_inputs(received.images[rows[:1]], received, settings, 4) != -score[rows[0]]


def test_strip_flags_the_clean_share_that_it_is_told():
    received, _ = coloured()
    score = normal(180)
    for fpr in (0.0, 0.05, 0.1, 1.0):
        found = strip.flag(score, received, strip.Settings(fpr=fpr))
        assert found[received.clean].sum() == min(int(fpr * 90), 89)


def test_scale_up_by_hand():
    received, poison = coloured()
    settings = scale_up.Settings(batch=50)
    score = scale_up.score(received, settings, 0)
    pixels = received.images.double().numpy() / 255
    for i in (0, 30, 31, 90, 179):
        outs = [
            received.model(torch.tensor(np.clip(n * pixels[i : i + 1], 0, 1), dtype=torch.float32))[0]
            for n in (1, 3, 5, 7, 9, 11)
        ]
        first = outs[0].argmax()
        same = np.mean([(out.argmax() == first).item() for out in outs[1:]])
        sure = np.mean([out.softmax(0)[first].item() for out in outs[1:]])
        assert score[i].item() == pytest.approx(same + 0.01 * sure, abs=1e-5)
    assert (score[poison] >= 1).all()  # the corner is white at every scale


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.5, 0.6, 1.0])
def test_scale_up_compares_one_of_six_values(threshold):
    levels = torch.arange(6) / 5
    score = torch.cat([levels, levels + 0.01])  # ties broken by the confidence, 0 and 1
    found = scale_up.flag(score, None, scale_up.Settings(threshold=threshold))
    assert found.tolist() == [k / 5 >= threshold for k in range(6)] * 2


def convolutional(seed: int = 0) -> Received:
    """A network trained a little on colours, with batch norm; ten poisons with a white corner."""
    received, _ = coloured(240)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder("resnet_narrow", 8)
        model = Classifier(encoder, heads.Head(encoder.dim, 3, HEAD))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(30):
            loss = F.cross_entropy(model(floats(received.images)), received.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    features = model.eval().encoder(floats(received.images)).detach()
    return replace(received, model=model, features=features)


def test_amplifying_multiplies_the_last_norms_of_a_copy():
    received = convolutional()
    before = {name: tensor.clone() for name, tensor in received.model.state_dict().items()}
    after = ibd_psc.amplified(received.model, 3, 1.5).state_dict()
    last = [name for name, m in received.model.named_modules() if isinstance(m, nn.BatchNorm2d)][-3:]
    for name, tensor in received.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        scaled = any(name == f"{norm}.{part}" for norm in last for part in ("weight", "bias"))
        assert torch.equal(after[name], tensor * 1.5 if scaled else tensor), name


def test_ibd_psc_by_hand():
    # a factor of 0 switches norms off: with the last two, the shortcut's and bn2, features are 0 and
    # the prediction constant, wrong for two of three classes
    received = convolutional()
    settings = ibd_psc.Settings(omega=0.0, xi=0.5, models=3)
    images, clean = received.images, received.clean
    assert ibd_psc.first_amplified(received.model, images[clean], received.labels[clean], settings) == 2
    first = logits(received.model, images).argmax(1)
    with torch.no_grad():
        expected = received.model.head(torch.zeros(1, 192)).softmax(1)[0, first]
    score = ibd_psc.score(received, settings, 0)
    torch.testing.assert_close(score, expected)
    assert ibd_psc.flag(expected, received, replace(settings, threshold=0.4)).equal(expected >= 0.4)


def test_ibd_psc_says_so_when_no_amplification_confuses():
    received = convolutional()
    settings = ibd_psc.Settings(omega=1.0)
    with pytest.warns(UserWarning, match="starting at 7 of 12"):
        score = ibd_psc.score(received, settings, 0)
    first = logits(received.model, received.images).softmax(1).max(1).values
    torch.testing.assert_close(score, first)  # multiplied by 1, every copy is the model


# --- confusion training -------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 43])
def test_a_wrong_label_is_wrong_and_takes_every_other_value(classes):
    predictions = torch.arange(classes)
    seen = torch.stack([ct.wrong_labels(predictions, step, classes) for step in range(200)])
    assert (seen != predictions).all() and seen.min() == 0 and seen.max() == classes - 1
    assert all(len(column.unique()) == classes - 1 for column in seen.T)


def test_distilling_keeps_the_easiest_and_some_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 100 + [2] * 3)
    loss = torch.arange(203.0)
    kept = ct.distil(loss, labels, 0.2, 0.02)
    assert kept[:40].all() and kept[40:100].sum() == 0
    assert kept[100:102].all() and kept[102:200].sum() == 0  # 100 / 50
    assert kept[200:].tolist() == [True, False, False]  # small classes keep one
    order = torch.randperm(203, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ct.distil(loss[order], labels[order], 0.2, 0.02), kept[order])


def test_the_likelihood_ratio_against_numpy():
    points = normal(60, 5).double()
    suspect = torch.arange(60) < 15
    points[suspect] += 3

    def log_density(x, part):
        covariance = np.cov(part.T) + 1e-3 * np.eye(2)
        centred = x - part.mean(0)
        form = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred)
        return -0.5 * form - 0.5 * np.log(np.linalg.det(covariance)) - np.log(2 * np.pi)

    x = points.numpy()
    plane = x @ np.linalg.svd(x - x.mean(0))[2][:2].T
    a, o = suspect.numpy(), ~suspect.numpy()
    total = log_density(plane[a], plane[a]).sum() + log_density(plane[o], plane[o]).sum()
    expected = math.exp((total - log_density(plane, plane[o]).sum()) / 60)
    assert ct.likelihood_ratio(points, suspect) == pytest.approx(expected, rel=1e-6)
    assert expected > 2
    assert ct.likelihood_ratio(points, torch.arange(60) < 1) == 1


QUICK_CT = ct.Settings(
    ratios=(0.5, 0.2), epochs=(10, 10, 10), steps=(300, 300, 300), weights=(20.0, 20.0, 15.0),
    confusion_lr=(0.01, 0.01, 0.01), lr=0.05,
)  # fmt: skip


def shortcut(poisons: int = 60) -> tuple[Received, Tensor]:
    """Classes told apart by three dimensions; poisons of all classes labelled 0 carry one of their own."""
    received, _ = gaussians(0)
    poison = torch.zeros(1200, dtype=torch.bool)
    poison[(received.labels != 0).nonzero().flatten()[:poisons]] = True
    features = received.features / 4
    features[poison, 20] += 8.0
    labels = torch.where(poison, 0, received.labels)
    clean = torch.zeros(1200, dtype=torch.bool)
    clean[900:] = True
    head = heads.new_head(32, 3, HEAD, 0, "head")
    heads.fit_head(head, features, labels, HEAD.epochs, 0, "head", bar=False)
    model = SimpleNamespace(head=head, eval=lambda: SimpleNamespace(head=head))
    return replace(received, model=model, features=features, labels=labels, clean=clean), poison


def test_ct_keeps_the_shortcut_and_forgets_the_rest():
    received, poison = shortcut()
    score = ct.score(received, QUICK_CT, 0)
    tpr, fpr = rates(ct.flag(score, received, QUICK_CT), poison)
    assert tpr > 0.95 and fpr < 0.05


def test_ct_flags_no_class_of_a_clean_set():
    received, _ = shortcut(0)
    score = ct.score(received, QUICK_CT, 0)
    assert not ct.flag(score, received, QUICK_CT).any()


# --- ASSET --------------------------------------------------------------------------------------


def medcouple_by_pairs(x: np.ndarray) -> float:
    x = np.sort(x)[::-1]
    median = np.median(x)
    upper, lower = x[x >= median], x[x <= median]
    ties = (x == median).sum()
    values = []
    for i, a in enumerate(upper):
        for j, b in enumerate(lower):
            if a == b:
                place = i - (len(upper) - ties)
                values.append(np.sign(ties - 1 - place - j))
            else:
                values.append(((a - median) - (median - b)) / (a - b))
    return float(np.median(values))


@pytest.mark.parametrize("n", [5, 30, 31])
def test_the_medcouple_pair_by_pair(n):
    x = np.random.default_rng(n).exponential(size=n)
    assert asset.medcouple(torch.tensor(x)).item() == pytest.approx(medcouple_by_pairs(x), abs=1e-12)
    x = np.random.default_rng(n).integers(0, 4, n).astype(float)  # ties, also at the median
    assert asset.medcouple(torch.tensor(x)).item() == pytest.approx(medcouple_by_pairs(x), abs=1e-12)


def test_the_medcouple_is_an_odd_function_of_skewness():
    x = torch.tensor(np.random.default_rng(0).exponential(size=200))
    assert asset.medcouple(x) > 0.2
    assert asset.medcouple(-x).item() == pytest.approx(-asset.medcouple(x).item())
    assert asset.medcouple(3 * x + 5).item() == pytest.approx(asset.medcouple(x).item())
    assert asset.medcouple(torch.linspace(-1, 1, 101)).abs() < 1e-6


def test_adjusted_outlyingness_by_hand():
    x = torch.arange(9.0)  # symmetric: medcouple 0, so both whiskers are 1.5 IQR = 6 from the quartiles
    expected = (x - 4).abs() / (6 + 1.5 * 4 - 4)
    torch.testing.assert_close(asset.adjusted_outlyingness(x).float(), expected)


def test_asset_threshold_by_hand():
    score = torch.tensor([1.0, 2.0, 3.0, 9.0, 9.0])  # lower half 1, 2, 3: mean 2, variance 2/3
    sigma = math.sqrt(2 / 3)
    cut = asset.threshold(score, 1e-6, released_cut=False)
    assert scipy.stats.norm.pdf(cut, 2, sigma) == pytest.approx(1e-6, rel=1e-6)
    released = 2 + sigma * math.sqrt(-2 * math.log(1e-6) * sigma * math.sqrt(2 * math.pi))
    assert asset.threshold(score, 1e-6, released_cut=True) == pytest.approx(released, rel=1e-6)
    assert asset.threshold(torch.ones(5), 1e-6, released_cut=False) == pytest.approx(1)


def test_the_inner_filter_names_who_is_not_among_the_clean():
    batch, clean = normal(300, 8), normal(300, 8, seed=1)
    batch[:15, 0] += 8
    found = asset.outliers(batch, clean, asset.Settings(inner_lr=1e-3), 0)
    assert found[:15].float().mean() > 0.3 and found[15:].float().mean() < 0.01


def test_asset_raises_the_loss_of_the_planted():
    received, poison = shortcut()
    settings = asset.Settings(epochs=4, batch=256, lr=6e-3, inner_steps=30, inner_lr=2e-3, layer="encoder")
    score = asset.score(received, settings, 1)  # by a scorer that gives them the lowest loss if left alone
    assert auroc(score, poison) > 0.95
    tpr, fpr = rates(asset.flag(score, received, settings), poison)
    assert tpr > 0.9 and fpr < 0.15


# --- META-SIFT ----------------------------------------------------------------------------------


def test_the_meta_loss_evaluated_another_way():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, v = nn.Linear(4, 3).double(), meta_sift.weigher().double()
    x, y = normal(12, 4).double(), torch.arange(12) % 3

    def by_hand() -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        w = v(losses.detach()[:, None])[:, 0]
        w = (w / w.sum()).detach()
        p = F.one_hot(y, 3) - model(x).softmax(1)  # minus the gradient of each loss in its logits
        ahead = {
            "weight": model.weight + 0.1 * (w[:, None] * p).T @ x,
            "bias": model.bias + 0.1 * (w[:, None] * p).sum(0),
        }
        later = F.cross_entropy(functional_call(model, ahead, (x,)), y, reduction="none")
        rejected = 1 - v(later[:, None])[:, 0]
        return -(rejected / rejected.sum() * later).sum()

    loss = meta_sift.meta_loss(model, v, x, y, 0.1)
    assert loss.item() == pytest.approx(by_hand().item(), rel=1e-9)


def test_the_meta_gradient_runs_through_the_step():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
    x, y = normal(12, 4).double(), torch.arange(12) % 3

    class Two(nn.Module):
        """Weights for the step, differing by sample, and equal ones for the losses after it."""

        def __init__(self):
            super().__init__()
            self.tilt = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
            self.calls = 0

        def forward(self, losses: Tensor) -> Tensor:
            self.calls += 1
            return torch.sigmoid(self.tilt * losses) if self.calls % 2 else 0.5 + 0 * losses

    v, step = Two(), 1e-6
    meta_sift.meta_loss(model, v, x, y, 0.5).backward()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            v.tilt += sign * step
        values.append(meta_sift.meta_loss(model, v, x, y, 0.5).item())
        with torch.no_grad():
            v.tilt -= sign * step
    expected = (values[0] - values[1]) / (2 * step)
    assert abs(expected) > 1e-4
    assert v.tilt.grad.item() == pytest.approx(expected, rel=1e-5)


def test_meta_sift_finds_wrong_labels_and_keeps_its_share():
    received, _ = gaussians(0)
    wrong = torch.rand(1200, generator=torch.Generator().manual_seed(1)) < 0.15
    received = replace(received, labels=torch.where(wrong, (received.labels + 1) % 3, received.labels))
    settings = meta_sift.Settings(sifters=3, warmup_epochs=2, epochs=3, lr=3e-3, v_lr=0.05, keep=0.1)
    score = meta_sift.score(received, settings, 0)
    assert ((score <= 0) & (score >= -1)).all()
    assert auroc(score, wrong) > 0.95
    kept = ~meta_sift.flag(score, received, settings)
    assert torch.bincount(received.labels[kept]).tolist() == [
        int(0.1 * size) for size in torch.bincount(received.labels)
    ]
    assert not wrong[kept].any()
