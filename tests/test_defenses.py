"""What every baseline defence keeps to, and the parts that they share."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tcore.defenses import _interface as defense
from tcore.defenses import _selection as selection
from tcore.defenses._interface import NotApplicable, Received
from tcore.evaluation import metrics, results
from tcore.experiment import registry
from tcore.files import InputError
from tcore.models import head as heads
from tcore.models.classifier import Classifier
from tcore.models.encoder import Encoder, extract_features
from tcore.running import provenance

NAMES = registry.names("defenses")
OTHERS = ("poisoning", "evaluation", "encoder_attacks", "dataset_attacks", "data/sources")
HEAD = heads.Settings(hidden=(16, 8), epochs=3, lr=1e-2, batch=32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(part: str = "head", norm: bool = True) -> Received:
    """Three classes of 40 images in colours of their own, 10 of class 0 with a white corner."""
    labels = torch.arange(120) % 3
    images = (random(120, 3, 16, 16) * 120).to(torch.uint8)
    images[torch.arange(120), labels] += 100
    images[(labels == 0).nonzero().flatten()[:10], :, :5, :5] = 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = Encoder("resnet_narrow", 16)
    if not norm:
        for name, module in list(encoder.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, last = name.rpartition(".")
                setattr(encoder.get_submodule(parent), last, nn.Identity())
    features = extract_features(encoder, images)
    head = heads.new_head(features.shape[1], 3, HEAD, 0, "head")
    heads.fit_head(head, features, labels, HEAD.epochs, 0, "head", bar=False)
    clean = torch.zeros(120, dtype=torch.bool)
    clean[60:90] = True
    return Received(Classifier(encoder, head).eval(), images, labels, features, 3, clean, HEAD, part)


def quick(method):
    """The method's settings with every count of epochs, steps and rounds at its least."""
    given = {}
    for field in dataclasses.fields(method.Settings):
        if any(word in field.name for word in ("epochs", "steps", "rounds")):
            given[field.name] = tuple(1 for _ in field.default) if isinstance(field.default, tuple) else 1
    return method.Settings(**given)


def run(method, received: Received, seed: int = 0) -> list[Tensor]:
    """What a method gives, as tensors."""
    if method.KIND == "detector":
        return list(defense.detect(method, received, quick(method), selection.Settings(), seed))
    model, _ = defense.repair(method, received, quick(method), seed)
    return list(model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_a_method_declares_what_it_is(name):
    method = registry.load("defenses", name)
    assert method.KIND in ("detector", "model")
    assert isinstance(method.CLEAN, bool) and isinstance(method.NEEDS_NORM, bool)
    assert set(method.ORACLE) <= {field.name for field in dataclasses.fields(method.Settings)}
    assert all(hasattr(method, f) for f in (("score", "flag") if method.KIND == "detector" else ("repair",)))
    assert len(method.__doc__) > 300


@pytest.mark.parametrize("name", NAMES)
def test_a_method_imports_nothing_of_the_evaluators(name):
    files = {
        str(path.relative_to(provenance.ROOT))
        for path in provenance.closure([registry.path("defenses", name)])
    }
    assert not [file for file in files if file.startswith(tuple(f"tcore/{folder}/" for folder in OTHERS))]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_keeps_to_its_contract(name):
    method = registry.load("defenses", name)
    received = tiny()
    if not method.CLEAN:
        received = dataclasses.replace(received, clean=None)
    before = copy.deepcopy(received)
    torch.manual_seed(5)
    first = run(method, received)
    for ours, theirs in zip(
        received.model.state_dict().values(), before.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not any(module.training for module in received.model.modules())
    for field in ("images", "labels", "features", "clean"):
        ours, theirs = getattr(received, field), getattr(before, field)
        assert ours is theirs is None or torch.equal(ours, theirs), field
    torch.manual_seed(6)  # results come from the seed, not from the global state
    again = run(method, received)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if method.KIND == "detector":
        score, kept = first
        assert score.shape == kept.shape == (120,)
        assert score.is_floating_point() and kept.dtype == torch.bool
        assert len(score.unique()) > 3
        assert method.flag(score, received, quick(method)).shape == (120,)
        if method.CLEAN:
            assert kept[received.clean].all()
    else:
        assert all(tensor.isfinite().all() for tensor in first)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_needs_is_what_it_declares(name):
    method = registry.load("defenses", name)
    bare = dataclasses.replace(tiny(), clean=None)
    if method.CLEAN:
        with pytest.raises(NotApplicable, match="clean"):
            run(method, bare)
        with pytest.raises(NotApplicable, match="clean"):
            run(method, dataclasses.replace(bare, clean=torch.zeros(120, dtype=torch.bool)))
    if method.NEEDS_NORM:
        with pytest.raises(NotApplicable, match="batch norm"):
            run(method, tiny(norm=False))


# --- selection ----------------------------------------------------------------------------------

SCORE = torch.tensor([5.0, 1, 4, 2, 3, 9, 7, 8, 6, 0])
LABEL = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("rule", "flagged"),
    [
        (("budget", 0.5, True), [0, 2, 5, 6, 7]),
        (("budget", 0.5, False), [0, 5, 6, 7, 8]),
        (("budget", 0.24, True), [5]),  # floor(0.96) and floor(1.44)
        (("budget", 1.0, True), [0, 2, 3, 4, 5, 6, 7, 8]),  # a class keeps its best
        (("cleanest", 0.5, True), [0, 2, 5, 6, 7]),
        (("cleanest", 0.01, True), [0, 2, 3, 4, 5, 6, 7, 8]),
        (("cleanest", 0.01, False), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (("budget", 0.0, True), []),
    ],
)
def test_rules_by_hand(rule, flagged):
    found = selection.flagged(SCORE, LABEL, selection.Settings(*rule))
    assert found.nonzero().flatten().tolist() == flagged


def test_shares_are_exact_decimals():
    labels = torch.zeros(100, dtype=torch.long)
    for share in (0.29, 0.57, 0.07):  # 0.29 * 100 is 28.999999999999996 in floating point
        settings = selection.Settings("budget", share)
        assert selection.flagged(random(100), labels, settings).sum() == round(100 * share)


def test_the_worst_are_counted_per_class_and_capped():
    assert selection.worst(SCORE, LABEL, 2).nonzero().flatten().tolist() == [0, 2, 5, 7]
    assert selection.worst(SCORE, LABEL, 5, cap=0.5).nonzero().flatten().tolist() == [0, 2, 5, 6, 7]


def test_equal_scores_follow_the_rows():
    kept = selection.cleanest(torch.zeros(10), LABEL, 0.5)
    assert kept.nonzero().flatten().tolist() == [0, 1, 4, 5, 6]


# --- what they share ----------------------------------------------------------------------------


def test_layers_are_those_of_the_suspect_head():
    received = tiny()
    with torch.no_grad():
        z = nn.functional.normalize(received.features, dim=1)
        hidden = torch.relu(received.model.head.fc1(z))
        last = torch.relu(received.model.head.fc2(hidden))
    assert torch.equal(received.layer("encoder"), received.features)
    assert torch.equal(received.layer("hidden"), hidden)
    assert torch.equal(received.layer("penultimate"), last)
    with pytest.raises(InputError, match="layer"):
        received.layer("first")


@pytest.mark.parametrize("part", defense.PARTS)
def test_a_network_is_new_and_comes_from_its_stream(part):
    received = tiny(part)
    first, again, other = (received.network(0, name).eval() for name in ("a", "a", "b"))
    with torch.no_grad():
        out = first(received.inputs)
        assert torch.equal(out, again(received.inputs)) and not torch.equal(out, other(received.inputs))
        torch.testing.assert_close(out, first.activations(received.inputs)[2])
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert any("conv" in name for name in trained) == (part == "all")
    if part == "all":
        start = Encoder("resnet_narrow", 16)
        model = dataclasses.replace(received, encoder=start).network(0, "a").model
        assert torch.equal(model.encoder.conv1.weight, start.conv1.weight)
        assert not torch.equal(model.encoder.conv1.weight, received.model.encoder.conv1.weight)


def test_retraining_is_the_head_recipe_on_what_is_kept():
    received = tiny()
    kept = torch.arange(120) % 4 > 0
    model = defense.retrain(received, kept, 3)
    head = heads.new_head(received.features.shape[1], 3, HEAD, 3, "head")
    heads.fit_head(head, received.features[kept], received.labels[kept], HEAD.epochs, 3, "head", bar=False)
    assert all(torch.equal(a, b) for a, b in zip(model.head.parameters(), head.parameters(), strict=True))
    everything = defense.retrain(received, torch.ones(120, dtype=torch.bool), 0)
    for a, b in zip(everything.head.parameters(), received.model.head.parameters(), strict=True):
        assert torch.equal(a, b)  # keeping all is no defence
    with pytest.raises(NotApplicable, match="nothing is left"):
        defense.retrain(received, torch.zeros(120, dtype=torch.bool), 0)


# --- evaluation ---------------------------------------------------------------------------------


def test_auroc_is_a_share_of_pairs():
    score, poison = np.array([1.0, 2, 2, 3, 0]), np.array([False, True, False, True, False])
    pairs = [(p > o) + 0.5 * (p == o) for p in score[poison] for o in score[~poison]]
    assert metrics.auroc(score, poison) == pytest.approx(np.mean(pairs)) == pytest.approx(5.5 / 6)
    assert np.isnan(metrics.auroc(score, np.zeros(5, bool)))


def samples(score, kept, trusted=(), labels=None) -> pd.DataFrame:
    n = len(score)
    return pd.DataFrame(
        {
            "index": range(n),
            "label": np.zeros(n, int) if labels is None else labels,
            "score": score,
            "kept": ~np.isin(range(n), kept),
            "trusted": np.isin(range(n), trusted),
        }
    )


def truth(n: int, poisons=()) -> pd.DataFrame:
    return pd.DataFrame({"index": range(n), "is_poison": np.isin(range(n), poisons), "is_cover": False})


def numbers(rows: list[dict]) -> dict:
    return {(row["stage"], row["metric"]): row["value"] for row in rows}


def test_detector_rows_by_hand():
    score = [9.0, 8, 1, 2, 3, 7, 0, 0]  # poisons 0, 1, 2; dropped 0, 1, 5; 6 and 7 are trusted
    found = numbers(results.detector_rows(truth(8, [0, 1, 2]), samples(score, [0, 1, 5], [6, 7])))
    assert found["detect", "tpr"] == 2 / 3 and found["detect", "fpr"] == 1 / 3
    assert found["detect", "auroc"] == pytest.approx(6 / 9)  # 9 and 8 beat three others each, 1 none
    assert (found["cleanest", "size"], found["cleanest", "poisons"]) == (1, 1)


def test_input_detectors_are_judged_on_images_of_other_classes():
    inputs = pd.DataFrame(
        {
            "label": [0, 1, 2, 0, 1, 2, 0, 1, 2],
            "view": ["clean"] * 3 + ["encoder_trigger"] * 3 + ["dataset_trigger"] * 3,
            "score": [1, 2, 3, 0, 9, 2.5, 0, 0, 9],
            "flagged": [False, False, True, True, True, False, False, False, True],
        }
    )
    triggers = {"encoder": {"attack": "x", "target": 0}, "dataset": {"attack": "y", "target": 2}}
    found = numbers(results.input_rows(inputs, triggers, "y"))
    assert found == {
        ("inputs", "auroc_encoder"): pytest.approx(5 / 6),
        ("inputs", "tpr_encoder"): 1 / 2,
        ("inputs", "auroc_dataset"): 0,
        ("inputs", "tpr_dataset"): 0,
        ("inputs", "fpr"): pytest.approx(1 / 3),
    }
    assert set(numbers(results.input_rows(inputs, triggers, "adaptive"))) == {
        ("inputs", name) for name in ("auroc_encoder", "tpr_encoder", "fpr")
    }
    assert results.input_rows(inputs, {"encoder": {"attack": "clean"}}, "y") == []


def test_input_detectors_are_judged_on_the_classes_that_an_attack_aims_at():
    """TaCT aims at its source classes: a detector that flags exactly those is perfect."""
    inputs = pd.DataFrame({"label": [0, 1, 2, 3] * 2, "view": ["clean"] * 4 + ["dataset_trigger"] * 4})
    aimed = (inputs["view"] != "clean") & (inputs["label"] == 1)
    triggers = {"dataset": {"attack": "tact", "target": 2, "goals": [-1, 2, -1, -1]}}
    found = numbers(results.input_rows(inputs.assign(score=aimed * 1.0, flagged=aimed), triggers, "tact"))
    assert found["inputs", "tpr_dataset"] == found["inputs", "auroc_dataset"] == 1


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(registry.load("defenses", n), "score_inputs")])
def test_input_detectors_score_an_image_by_itself(name):
    method, received = registry.load("defenses", name), tiny()
    assert method.INPUTS
    whole = method.score_inputs(received.images[:30], received, quick(method), 0)
    parts = [method.score_inputs(part, received, quick(method), 0) for part in received.images[:30].split(11)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(registry.load("defenses", n), "score_inputs")])
def test_the_rule_for_inputs_is_that_of_the_training_set(name):
    """On the scores of the training set itself, both rules flag the same samples."""
    method, received = registry.load("defenses", name), tiny()
    score = method.score(received, quick(method), 0)
    expected = method.flag(score, received, quick(method))
    assert torch.equal(defense.flag_inputs(method, score, received, quick(method), 0), expected)


def test_the_cleanest_are_one_percent_of_each_class():
    labels = np.arange(600) % 2
    score = np.arange(600.0)
    score[1] = 999  # a poison of class 1; class 0's poison keeps the lowest score of its class
    found = numbers(results.detector_rows(truth(600, [0, 1]), samples(score, [], labels=labels)))
    assert (found["cleanest", "size"], found["cleanest", "poisons"]) == (6, 1)
    assert found["detect", "tpr"] == 0


def test_without_poisons_the_true_positive_rate_is_null_and_without_flags_zero():
    found = numbers(results.detector_rows(truth(8), samples(np.arange(8.0), [0])))
    assert np.isnan(found["detect", "tpr"]) and np.isnan(found["detect", "auroc"])
    assert found["detect", "fpr"] == 1 / 8
    nothing = numbers(results.detector_rows(truth(8, [1]), samples(np.arange(8.0), [])))
    assert nothing["detect", "tpr"] == nothing["detect", "fpr"] == 0
