"""The paper's figures: planted victims whose numbers are known, formulas evaluated another way, drawings."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from tcore.data.images import ImageSet, write_images
from tcore.dataset_attacks import badnets
from tcore.defenses import clp, ct
from tcore.defenses._interface import Received
from tcore.evaluation import metrics
from tcore.experiment import grid, registry, settings
from tcore.files import InputError, load_json, save_table, save_tensors
from tcore.models import head as heads
from tcore.models.classifier import Classifier, logits, save_classifier
from tcore.models.encoder import Encoder, extract_features
from tcore.paper.figures import _declared as paper_figure
from tcore.paper.figures import _drawing, _victim, figure_1, figure_2, figure_3, figure_5, figure_6
from tcore.poisoning import triggers
from tcore.stages import expand
from tcore.stages.bootstrap import norms_behind

ROOT = Path(__file__).resolve().parents[1]
HEAD = heads.Settings(hidden=(16, 8), epochs=20, lr=0.01, batch=16)
PLAIN = heads.Settings(hidden=(8, 8), normalize=False)
TARGET = 1


def images(n: int, seed: int) -> ImageSet:
    """Four colours with noise."""
    colours = np.array([[180, 40, 40], [40, 180, 40], [40, 40, 180], [160, 160, 40]])
    noise = np.random.default_rng(seed).integers(-40, 41, (n, 16, 16, 3))
    pixels = (colours[np.arange(n) % 4][:, None, None] + noise).astype(np.uint8)
    return ImageSet(pixels, np.arange(n) % 4, 100 + np.arange(n), tuple("abcd"), "planted")


def white(pixels: Tensor) -> Tensor:
    """The trigger: a white corner."""
    out = pixels.clone()
    out[:, :, :6, :6] = 255
    return out


def new_encoder(architecture: str = "resnet_tiny") -> Encoder:
    """Statistics, scales and shifts as after training: none of them trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(architecture, 16)
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.2, 1.8)
                nn.init.uniform_(module.bias, -0.1, 0.1)
    return encoder.eval()


@pytest.fixture
def victim() -> _victim.Victim:
    """80 images of four classes, ten of them poisons with label 1, and a head that was trained on them."""
    train, test = images(80, 0), images(60, 1)
    is_poison = torch.zeros(80, dtype=torch.bool)
    is_poison[[0, 2, 3, 4, 6, 7, 8, 10, 11, 12]] = True  # of all other classes
    pixels, labels = train.tensor.clone(), train.targets.clone()
    pixels[is_poison], labels[is_poison] = white(pixels[is_poison]), TARGET
    train = replace(train, pixels=pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels=labels.numpy())
    encoder = new_encoder()
    features = extract_features(encoder, train.tensor)
    head = heads.new_head(encoder.dim, 4, HEAD, 0, "head")
    heads.fit_head(head, features, labels, HEAD.epochs, 0, "head", bar=False)
    assert len(head(extract_features(encoder, test.tensor)).argmax(1).unique()) > 1  # it is not dead
    received = Received(Classifier(encoder, head), train.tensor, labels, features, 4, None, HEAD)
    return _victim.Victim(
        received=received,
        train=train,
        is_poison=is_poison,
        is_cover=torch.zeros(80, dtype=torch.bool),
        test=test,
        stamp=white,
        target=TARGET,
        aim=TARGET,
        scenario="T2",
        seed=0,
    )


def rows_of(name: str, victim: _victim.Victim, **overrides) -> pd.DataFrame:
    """What a figure measures, by brief settings."""
    given = {method: settings.resolve(method) for method in paper_figure.methods(name)}
    return registry.load(paper_figure.FAMILY, name).measure(
        victim, {method: own | overrides.get(method, {}) for method, own in given.items()}
    )


# --- which victims --------------------------------------------------------------------------------

GRID = {
    "seeds": [0, 1],
    "pairs": [{"pretrain": "a", "downstream": "b"}, {"pretrain": "c", "downstream": "b"}],
    "scenarios": ["clean", "T1", "T2", "T3", "T1+T2"],
    "encoder_attacks": ["badencoder", "ctrl"],
    "dataset_attacks": ["badnets", "badnets_10", "sig"],
    "defenses": ["none", "tcore"],
}


def test_victims_by_hand():
    """Two pairs and two seeds: 4 of each."""
    cells = grid.cells(GRID)
    counts = {name: len(paper_figure.victims(name, cells)) // 4 for name in paper_figure.names()}
    assert counts == {
        "figure_1": 1,  # BadNets
        "figure_2": 1,
        "figure_3": 1 + 1,  # and BadEncoder in T3
        "figure_4": 2 + 3 + 2,  # T1, T2, T3
        "figure_5": 2 + 1,  # both encoders, BadNets
        "figure_6": 3,  # all of T2
    }
    found = paper_figure.victims("figure_3", cells)
    assert set(zip(found["scenario"], found["encoder_attack"], found["dataset_attack"], strict=True)) == {
        ("T2", "clean", "badnets"),
        ("T3", "badencoder", "adaptive"),
    }
    assert not found.duplicated().any() and list(found) == paper_figure.IDENTITY
    nothing = grid.cells(GRID | {"scenarios": ["clean", "T1+T2"]})
    assert all(paper_figure.victims(name, nothing).empty for name in paper_figure.names())
    assert paper_figure.wanted("figure_5") == "T1 or T2 with badnets"


@pytest.mark.parametrize("name", paper_figure.names())
def test_a_figure_declares_what_it_is(name):
    figure, declared = registry.load(paper_figure.FAMILY, name), paper_figure.declared(name)
    assert (
        figure.TITLE.startswith(name.replace("_", " ").capitalize()) and "The paper reports" in figure.CAPTION
    )
    assert (declared["CELLS"], declared["METHODS"]) == (figure.CELLS, figure.METHODS)
    assert declared["CELLS"].keys() <= {"T1", "T2", "T3"}  # one trigger each
    assert set(paper_figure.methods(name)) <= set(settings.methods())
    known = {*registry.names("encoder_attacks"), *registry.names("dataset_attacks")}
    assert all(set(attacks or ()) <= known for attacks in declared["CELLS"].values())


def test_scales_by_hand():
    assert paper_figure.scale("figure_4", 0.1, 10.0)[:4] == [0, 0.1, 0.2, 0.3]
    assert len(paper_figure.scale("figure_4", 0.1, 10.0)) == 101
    assert paper_figure.scale("figure_2", 0.3, 1) == [0, 0.3, 0.6, 0.9]
    for step in (0.0, -0.1, 0.3):
        with pytest.raises(InputError, match=r"methods\.figure_6\.step = "):
            paper_figure.scale("figure_6", step, 0.2)


# --- figure 1 -------------------------------------------------------------------------------------


def passing(features: Tensor, victim: _victim.Victim) -> _victim.Victim:
    """`victim` with these features (n, 8), none negative, which its head passes on as they are."""
    head = heads.new_head(8, 4, PLAIN, 0, "x")
    for layer in (head.fc1, head.fc2):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    model = Classifier(victim.received.model.encoder, head.eval())
    return replace(victim, received=replace(victim.received, model=model, features=features))


@pytest.mark.parametrize(("offset", "expected"), [(9.0, 1.0), (0.0, 0.0)])
def test_planted_outliers_have_the_auroc_that_they_should(victim, offset, expected):
    """The class's own on a circle of radius 3 around the mean, poisons at its centre or outside, in pairs."""
    own = (victim.received.labels == TARGET).nonzero().flatten()
    clean, poisons = own[~victim.is_poison[own]], own[victim.is_poison[own]]
    features = torch.full((80, 8), 20.0)
    angle = torch.arange(len(clean)) * 2 * math.pi / len(clean)
    features[clean, 0] += 3 * angle.cos()
    features[clean, 1] += 3 * angle.sin()
    features[poisons, 2] += offset * torch.tensor([1.0, -1.0]).repeat(5)
    found = figure_1.measure(passing(features, victim), {})
    assert figure_1.aurocs(found)["distance"] == expected
    np.testing.assert_allclose(found.loc[~found["is_poison"], "distance"], 3, rtol=1e-5)
    np.testing.assert_allclose(found.loc[found["is_poison"], "distance"], offset, atol=1e-4)
    assert set(found["index"]) == set(victim.train.index[own.numpy()])


def test_the_projection_is_that_of_a_singular_value_decomposition(victim):
    found = figure_1.measure(victim, {})
    own = victim.received.labels == TARGET
    features = victim.received.layer("penultimate")[own].double().numpy()
    u, s, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    np.testing.assert_allclose(found[["x", "y"]].abs(), np.abs(u * s)[:, :2], atol=1e-6)
    assert found["x"].std() > found["y"].std()


# --- figures 2 and 6: ranks -----------------------------------------------------------------------


def test_tails_by_hand():
    loss = np.array([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 0])
    is_poison = np.array([0, 1, 0, 1, 0, 0, 1, 0, 0, 0], bool)
    # smallest first: 0 (clean), 1 (poison), 2 (poison), 3, ...; largest first: 9, 8 (poison), 7, ...
    counts = {part: figure_2.smallest(loss, is_poison, part) for part in (0.01, 0.3, 1.0)}
    assert [(found["size"], found["poisons"]) for found in counts.values()] == [(1, 0), (3, 2), (10, 3)]
    assert counts[0.3]["value"] == pytest.approx(1 / 3)
    assert (counts[0.3]["low"], counts[0.3]["high"]) == pytest.approx(metrics.wilson(1, 3))
    counts = {tail: figure_6.largest(loss, is_poison, tail) for tail in (0.05, 0.1, 0.29, 0.3)}
    assert [(found["size"], found["poisons"]) for found in counts.values()] == [
        (1, 0),
        (1, 0),
        (2, 1),
        (3, 1),
    ]
    assert counts[0.29]["value"] == 0.5 and counts[0.3]["value"] == pytest.approx(1 / 3)


def test_figure_2_ranks_the_target_class_by_the_last_network(victim, monkeypatch):
    """A network that is sure of all labels but the poisons': they have the largest losses."""
    labels = victim.received.labels
    trusted = (labels == TARGET) & ~victim.is_poison & (torch.arange(80) < 20)
    victim = replace(victim, received=replace(victim.received, clean=trusted))
    answers = torch.where(victim.is_poison, 0, labels)
    sure = {
        tuple(z.tolist()): 9.0 * F.one_hot(k, 4)
        for z, k in zip(victim.received.features, answers, strict=True)
    }
    network = lambda z: torch.stack([sure[tuple(row.tolist())] for row in z])  # noqa: E731
    monkeypatch.setattr(ct, "last_network", lambda *_: network)
    found = rows_of("figure_2", victim, figure_2={"step": 0.1})
    clean = int((labels == TARGET).sum() - 10 - trusted.sum())
    assert trusted.sum() == 5 and clean == 15
    assert found["size"].tolist() == [round(25 * k / 10) for k in range(1, 11)]
    assert found["poisons"].tolist() == [max(0, size - clean) for size in found["size"]]
    assert found["value"].iloc[-1] == 15 / 25


def test_figure_2_runs_confusion_training_itself(victim):
    trusted = ~victim.is_poison & (torch.arange(80) % 3 == 0)
    victim = replace(victim, received=replace(victim.received, clean=trusted))
    brief = {
        "ratios": (0.5,),
        "epochs": (2, 2),
        "steps": (5, 5),
        "weights": (5.0, 5.0),
        "confusion_lr": (0.01, 0.01),
    }
    found = rows_of("figure_2", victim, ct=brief, figure_2={"step": 0.5})
    network = ct.last_network(victim.received, ct.Settings(**brief), 0)
    chances = network(victim.received.features).softmax(1).detach().numpy()
    own = ((victim.received.labels == TARGET) & ~trusted).numpy()
    first = np.argsort(-chances[own, TARGET])[: round(own.sum() / 2)]
    assert found["poisons"].tolist() == [victim.is_poison.numpy()[own][first].sum(), 10]


def test_figure_6_ranks_as_the_first_round_of_expansion_does(victim):
    trusted = ~victim.is_poison & (torch.arange(80) % 8 == 1)
    victim = replace(victim, received=replace(victim.received, clean=trusted))
    received, brief = victim.received, {"epochs": 3, "steps": 20, "batch": 16, "per_class": True}
    found = rows_of("figure_6", victim, expand=brief, figure_6={"longest": 1.0, "step": 0.1})
    # One round that adds 8 samples, so many of the target class: its largest losses.
    options = expand.Settings(**settings.resolve("expand", brief))
    options = replace(options, subset_share=(int(trusted.sum()) + 8) / 80 + 1e-9, round_share=1.0)
    everywhere = torch.ones_like(trusted)
    rounds, _ = expand.expand(received.features, received.labels, trusted, everywhere, 4, options, HEAD, 0)
    added = (rounds == 1) & (received.labels == TARGET)
    assert (rounds == 1).sum() == 8 and added.sum() > 0
    n = int(((received.labels == TARGET) & ~trusted).sum())
    tail = (int(added.sum()) + 0.5) / n
    found_there = rows_of("figure_6", victim, expand=brief, figure_6={"longest": tail, "step": tail}).iloc[0]
    assert found_there["size"] == added.sum()
    assert found_there["poisons"] == (added & victim.is_poison).sum()
    assert found["size"].iloc[-1] == n and found["poisons"].iloc[-1] == 10
    assert found["ratio"].unique() == pytest.approx([10 / (received.labels == TARGET).sum().item()])


def test_an_attack_without_one_target_has_no_such_figure(victim):
    with pytest.raises(InputError, match="all_to_all"):
        figure_1.measure(replace(victim, target=None, aim=[1, 2, 3, 0]), {})


# --- figure 3 -------------------------------------------------------------------------------------


def test_the_loss_is_followed_from_the_start_to_the_users_head(victim):
    victim = replace(victim, is_cover=(torch.arange(80) % 8 == 1))
    received = victim.received
    found = rows_of("figure_3", victim, figure_3={"epochs": HEAD.epochs})
    assert found["epoch"].tolist() == [epoch for epoch in range(HEAD.epochs + 1) for _ in range(2)]
    assert set(found.loc[found["group"] == "clean", "n"]) == {80 - 10 - 10}  # neither poisons nor covers
    start = heads.new_head(received.features.shape[1], 4, HEAD, 0, "head").eval()
    for epoch, head in ((0, start), (HEAD.epochs, received.model.head)):
        with torch.no_grad():
            chances = head(received.features).double().softmax(1).numpy()
        losses = -np.log(chances[np.arange(80), received.labels.numpy()])
        for group, rows in (("clean", ~victim.is_poison & ~victim.is_cover), ("poison", victim.is_poison)):
            line = found[(found["epoch"] == epoch) & (found["group"] == group)].iloc[0]
            own = losses[rows.numpy()]
            assert line["value"] == pytest.approx(own.mean(), rel=1e-5)
            half = line["high"] - line["value"]
            assert half == pytest.approx(line["value"] - line["low"])
            assert (
                own.std(ddof=1) / np.sqrt(len(own)) * 1.96 < half < own.std(ddof=1) / np.sqrt(len(own)) * 2.3
            )


# --- figure 4 -------------------------------------------------------------------------------------


def test_clp_by_u_is_clp_one_by_one(victim):
    """Each scope and u against the defence with that setting, on images instead of cached features."""
    found = rows_of("figure_4", victim, figure_4={"highest": 2.0, "step": 0.5})
    assert len(found) == 5 * 3 * 2
    test = victim.test
    for (scope, u), rows in found.groupby(["scope", "u"]):
        model, log = clp.repair(victim.received, clp.Settings(u=u, scope=scope), 0)
        assert set(rows["pruned"]) == {sum(map(len, log["pruned"].values()))}
        clean, triggered = (logits(model, x).argmax(1).numpy() for x in (test.tensor, white(test.tensor)))
        value = rows.set_index("metric")["value"]
        assert value["acc"] == (clean == test.labels).mean()
        others = test.labels != TARGET
        assert value["asr"] == (triggered[others] == TARGET).mean()
        assert set(rows["n"]) == {60, 45}


def test_a_large_u_prunes_nothing_and_the_smallest_what_is_above_the_mean(victim):
    found = rows_of("figure_4", victim, figure_4={"highest": 50.0, "step": 50.0})
    counts = found.groupby(["scope", "u"])["pruned"].first()
    bounds = [bound.numpy() for bound in figure_5.bounds(victim.received.model.encoder).values()]
    above = sum((bound > bound.mean()).sum() for bound in bounds)
    assert counts["encoder", 0] == above > 100
    assert counts["both", 0] == counts["encoder", 0] + counts["head", 0]
    assert (counts[:, 50] == 0).all()
    unpruned = found[found["u"] == 50].groupby("metric")["value"].unique()
    right = logits(victim.received.model, victim.test.tensor).argmax(1).numpy() == victim.test.labels
    assert unpruned["acc"].tolist() == [right.mean()]


def test_a_unit_that_carries_the_backdoor_goes_at_its_u(victim):
    """Features that a trigger sets: one hidden unit with a large weight reads it and answers the target."""
    received = victim.received
    head = heads.new_head(received.features.shape[1], 4, PLAIN, 0, "x").eval()
    clean, triggered = (
        extract_features(received.model.encoder, f(victim.test.tensor)) for f in (lambda x: x, white)
    )
    direction = (triggered - clean).mean(0)
    middle = ((triggered.mean(0) + clean.mean(0)) / 2 @ direction).item()
    with torch.no_grad():
        for layer in (head.fc1, head.fc2, head.fc3):
            layer.weight.zero_()
            layer.bias.zero_()
        head.fc1.weight[0], head.fc1.bias[0] = 100 * direction, -100 * middle
        head.fc2.weight[:] = torch.eye(8)
        head.fc3.weight[TARGET, 0], head.fc3.bias[3] = 1.0, 1e-3
    victim = replace(victim, received=replace(received, model=Classifier(received.model.encoder, head)))
    found = rows_of("figure_4", victim, figure_4={"highest": 4.0, "step": 2.0})
    asr = found[(found["metric"] == "asr") & (found["scope"] == "head")].set_index("u")["value"]
    assert asr[2] == 0 and asr[4] > 0.5  # (8 - 1) / sqrt(8) = 2.47 deviations above the mean


def test_an_encoder_without_batch_norm_has_the_head_alone(victim):
    encoder = Encoder("vit", 16).eval()
    head = heads.new_head(encoder.dim, 4, HEAD, 0, "x").eval()
    victim = replace(victim, received=replace(victim.received, model=Classifier(encoder, head)))
    found = rows_of("figure_4", victim, figure_4={"highest": 0.5, "step": 0.5})
    assert set(found["scope"]) == {"head"} and len(found) == 4
    measured = rows_of("figure_5", replace(victim, scenario="T1"))
    assert measured.empty
    with pytest.raises(InputError, match="batch norm"):
        figure_5.draw(measured)


# --- figure 5 -------------------------------------------------------------------------------------


def test_a_layer_of_scaled_copies_correlates_perfectly(victim):
    """conv1's channels are one filter times a_k, nothing else differs: bound, change are a_k times one's."""
    encoder = victim.received.model.encoder
    scale = torch.linspace(0.5, 2, len(encoder.conv1.weight))
    with torch.no_grad():
        encoder.conv1.weight[:] = scale.view(-1, 1, 1, 1) * encoder.conv1.weight[:1].clone()
        nn.init.ones_(encoder.bn1.weight)
        nn.init.ones_(encoder.bn1.running_var)
    found = rows_of("figure_5", replace(victim, scenario="T1"))
    own = found[found["layer"] == "conv1"]
    assert own["correlation"].tolist() == pytest.approx([1.0] * len(scale))
    for column in ("bound", "change"):
        np.testing.assert_allclose(own[column] / own[column].iloc[0], scale / scale[0], rtol=1e-4)
    assert (found["network"] == "encoder").all()
    assert len(found) == sum(norm.num_features for norm in norms_behind(encoder).values())
    assert found.drop_duplicates("layer")["correlation"].abs().max() <= 1


def test_the_change_of_the_first_layer_another_way(victim):
    encoder, x = victim.received.model.encoder, victim.test.tensor[victim.test.labels != TARGET]
    found = rows_of("figure_5", replace(victim, scenario="T1"))
    difference = (
        (white(x).double() - x.double()) / 255 / 0.25
    )  # a convolution of the difference, by linearity
    with torch.no_grad():
        out = F.conv2d(difference, encoder.conv1.weight.double(), padding=1)
    gain = encoder.bn1.weight / (encoder.bn1.running_var + encoder.bn1.eps).sqrt()
    expected = (out * gain.view(1, -1, 1, 1)).square().sum((2, 3)).sqrt().mean(0).detach()
    np.testing.assert_allclose(found.loc[found["layer"] == "conv1", "change"], expected, rtol=1e-4)
    changes = figure_5.changes(encoder, x, white, batch=7)
    np.testing.assert_allclose(changes["conv1"], expected, rtol=1e-4)
    still = figure_5.changes(encoder, x, lambda images: images)
    assert all(float(change.abs().max()) == 0 for change in still.values())


def test_correlations_with_their_interval_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    r, low, high = figure_5.correlation(x, y)
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    expected = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.959964 / np.sqrt(37))
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-6)
    assert np.isnan(figure_5.correlation(x, np.ones(40))).all()


def test_the_other_network_is_trained_end_to_end_on_the_poisons(victim):
    """White corners are class 1 in training: 30 epochs on 80 images learn that."""
    found = rows_of("figure_5", victim, figure_5={"epochs": 30, "batch": 16, "lr": 0.05})
    assert (found["network"] == "end to end").all()
    assert found["asr"].iloc[0] > 0.8
    layers = found.groupby("layer")
    assert (layers["bound"].min() >= 0).all() and (layers["change"].max() > 0).all()


# --- drawings -------------------------------------------------------------------------------------


def measured(name: str, victim: _victim.Victim) -> pd.DataFrame:
    """A figure's rows for two victims with two seeds each, those of the second seed a little larger."""
    trusted = ~victim.is_poison & (torch.arange(80) % 3 == 0)
    victim = replace(victim, received=replace(victim.received, clean=trusted))
    brief = {
        "ct": {"ratios": (), "epochs": (1,), "steps": (2,), "weights": (5.0,), "confusion_lr": (0.01,)},
        "expand": {"epochs": 1, "steps": 2},
        "figure_2": {"step": 0.25},
        "figure_3": {"epochs": 1},
        "figure_4": {"highest": 1.0, "step": 0.5},
        "figure_5": {"epochs": 1},
    }
    rows, parts = rows_of(name, victim, **brief), []
    for attack in ("badnets", "blended"):
        for seed in (0, 1):
            own = {"pretrain": "a", "downstream": "b", "encoder_attack": "clean", "dataset_attack": attack}
            part = rows.assign(**own, scenario="T2", seed=seed)
            if "value" in part:
                part["value"] = part["value"] * (1 - 0.1 * seed)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("figure_1", 2),
        ("figure_2", 2),
        ("figure_3", 2),
        ("figure_4", 2 * 3),  # by scope
        ("figure_5", 2 * 2),  # channels and layers
        ("figure_6", 1),  # both have the same ratio
    ],
)
def test_every_figure_is_drawn_of_all_victims(victim, name, panels):
    figure, rows = registry.load(paper_figure.FAMILY, name), measured(name, victim)
    before = rows.copy()
    with matplotlib.rc_context(_drawing.STYLE):
        drawn = figure.draw(rows)
    assert isinstance(drawn, Figure)
    pd.testing.assert_frame_equal(rows, before)
    assert len([axes for axes in drawn.axes if axes.axison]) == panels
    assert figure.CAPTION.split()[-1] in drawn.get_supxlabel() and figure.TITLE[:8] in drawn.get_suptitle()


def test_a_curve_is_the_mean_over_seeds(victim):
    rows = measured("figure_6", victim)
    drawn = figure_6.draw(rows)
    curves = {line.get_label(): line for line in drawn.axes[0].lines}
    for attack in ("badnets", "blended"):
        own = rows[rows["dataset_attack"] == attack].groupby("tail")["value"].mean()
        np.testing.assert_allclose(curves[attack].get_xdata(), own.index)
        np.testing.assert_allclose(curves[attack].get_ydata(), own)


def test_no_stand_in_colour_is_left():
    assert not set(_drawing.charts.ROLES) & set(_drawing.STYLE.values())


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def files(victim, tmp_path) -> dict[str, Path]:
    """The victim as the workflow leaves it, BadNets's trigger in place of the corner."""
    places = {
        name: tmp_path / name
        for name in ("model", "features", "images", "truth", "test", "encoder_trigger", "dataset_trigger")
    }
    save_classifier(places["model"], victim.received.model, tuple("abcd"))
    save_tensors(places["features"], {"features": victim.received.features})
    write_images(places["images"], victim.train)
    write_images(places["test"], victim.test)
    truth = {"index": victim.train.index, "is_poison": victim.is_poison.numpy(), "is_cover": False}
    save_table(places["truth"], pd.DataFrame(truth).iloc[::-1])
    triggers.save(places["encoder_trigger"], {}, "encoder_attacks", "clean", 0)
    trigger = badnets.make_trigger(16, 16, badnets.Settings(size=6))
    triggers.save(places["dataset_trigger"], trigger, "dataset_attacks", "badnets", TARGET)
    return places


def read(files: dict[str, Path], **more) -> _victim.Victim:
    head = settings.resolve("head", {"hidden": [16, 8]})
    return _victim.read(**files, head=head, scenario="T2", seed=0, device=torch.device("cpu"), **more)


def test_a_victim_is_read_in_the_order_of_its_images(victim, files):
    found = read(files)
    assert torch.equal(found.is_poison, victim.is_poison)
    assert (found.target, found.aim) == (TARGET, TARGET)
    assert not torch.equal(found.stamp(found.test.tensor), found.test.tensor)
    truth = pd.read_parquet(files["truth"])
    save_table(files["truth"], truth.assign(index=truth["index"] + 1))
    with pytest.raises(InputError, match="truth: its indices"):
        read(files)


def test_a_victim_of_nobody_is_refused(files):
    triggers.save(files["dataset_trigger"], {}, "dataset_attacks", "clean", TARGET)
    with pytest.raises(InputError, match="holds a trigger"):
        read(files)


def call(script: str, *arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")


def test_from_files_to_a_picture(files, tmp_path):
    identity = {"pretrain": "a", "downstream": "b", "encoder_attack": "clean", "dataset_attack": "badnets"}
    paths = []
    for seed in (0, 1):
        paths.append(tmp_path / f"{seed}.parquet")
        arguments = [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", path)]
        given = {"head": settings.resolve("head"), "figure_3": {"epochs": 1}}
        arguments += ["--settings", json.dumps(given), "--record", tmp_path / "record"]
        arguments += ["--identity", json.dumps(identity | {"scenario": "T2", "seed": seed})]
        call("measure_figure", "--figure", "figure_3", *arguments, "--measured", paths[-1])
    out = {name: tmp_path / f"figure.{name}" for name in ("png", "csv", "json")}
    call(
        "draw_figure", "--figure", "figure_3", "--measured", *paths,
        "--picture", out["png"], "--csv", out["csv"], "--record", out["json"],
    )  # fmt: skip
    numbers = pd.read_csv(out["csv"])
    assert list(numbers)[: len(paper_figure.IDENTITY)] == paper_figure.IDENTITY
    expected = pd.concat([pd.read_parquet(path) for path in paths])
    assert len(numbers) == 8
    np.testing.assert_allclose(numbers["value"], expected["value"], rtol=1e-5)
    with Image.open(out["png"]) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    assert load_json(out["json"])["log"]["caption"] == figure_3.CAPTION
