"""The commands around a baseline defence, on a small planted set: what is granted, what comes out, n/a."""

import copy
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tcore.data.images import ImageSet, write_images
from tcore.defenses import _interface as defense
from tcore.experiment import registry
from tcore.files import load_json, load_table, save_json, save_table, save_tensors
from tcore.models.classifier import load_classifier, save_classifier
from tests.test_defenses import tiny

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NUMBERS = {"poison_rate": 0.1, "layer": "encoder", "factor": 1.5, "cap": 0.5}


def command(name: str, **options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        argv = [str(SCRIPTS / f"{name}.py")]
        for key, value in options.items():
            argv += [f"--{key.replace('_', '-')}", str(value)]
        patch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")


@pytest.fixture
def folder(tmp_path):
    """What a user holds; the images' indices are not their row numbers."""
    received = tiny()
    pixels = received.images.permute(0, 2, 3, 1).numpy()
    labels = received.labels.numpy()
    images = ImageSet(pixels, labels, 1000 + np.arange(120)[::-1], ("a", "b", "c"), "planted")
    write_images(tmp_path / "images", images)
    save_classifier(tmp_path / "model", received.model, images.class_names)
    save_tensors(tmp_path / "features", {"features": received.features})
    poison = np.zeros(120, bool)
    poison[np.flatnonzero(labels == 0)[:10]] = True
    truth = {"index": images.index, "clean_label": np.where(poison, 1, labels), "is_poison": poison}
    save_table(tmp_path / "truth", pd.DataFrame(truth).assign(is_cover=np.arange(120) == 119))
    return tmp_path


def defend(folder: Path, name: str = "spectral", samples: bool = True, **options) -> None:
    settings = {"defense": NUMBERS, "part": "head", "selection": {}, "head": {"hidden": [16, 8], "epochs": 2}}
    settings |= options.pop("settings", {})
    outputs = {"model_out": folder / "out", "record": folder / "defend.run.json"}
    if samples:
        outputs["samples"] = folder / "samples"
    inputs = {part: folder / part for part in ("model", "features", "images")}
    command("defend", defense=name, settings=json.dumps(settings), seed=0, **inputs, **outputs, **options)


def test_a_detector_leaves_a_model_and_its_samples(folder):
    defend(folder)
    table = load_table(folder / "samples")
    assert table.columns.tolist() == ["index", "label", "score", "kept", "trusted"]
    assert table["index"].tolist() == list(range(1119, 999, -1))
    assert (~table["kept"]).groupby(table["label"]).sum().tolist() == [18, 18, 18]  # 1.5 * 0.1 * 120
    assert load_classifier(folder / "out").head.classes == 3
    record = load_json(folder / "defend.run.json")
    assert record["settings"]["name"] == "spectral" and record["log"] == {}


def test_part_says_whether_the_encoder_is_trained_along(folder):
    abl = {"isolation_epochs": 1, "epochs": 1, "unlearn_epochs": 1, "batch": 32}
    before = load_classifier(folder / "model").encoder.state_dict()
    for part, same in (("head", True), ("all", False)):
        defend(folder, "abl", samples=False, settings={"defense": abl, "part": part})
        after = load_classifier(folder / "out").encoder.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before) == same


def test_an_oracle_fills_in_what_the_method_declares_and_nothing_else(folder):
    command("reveal_rate", truth=folder / "truth", oracle=folder / "oracle", record=folder / "r")
    assert load_json(folder / "oracle") == {"poison_rate": pytest.approx(10 / 120)}
    save_json(folder / "oracle", load_json(folder / "oracle") | {"factor": 9.0})
    defend(folder, oracle=folder / "oracle")
    assert (~load_table(folder / "samples")["kept"]).sum() == 3 * 15  # 1.5 * 10


def grant(folder: Path, share: float, seed: int = 0) -> np.ndarray:
    options = {"truth": folder / "truth", "granted": folder / "granted", "record": folder / "r"}
    command("grant_clean", share=share, seed=seed, **options)
    table = load_table(folder / "granted")
    assert table["index"].tolist() == load_table(folder / "truth")["index"].tolist()
    return table["granted"].to_numpy()


def test_what_is_granted_is_clean_and_of_every_class(folder):
    truth = load_table(folder / "truth")
    labels = np.arange(120) % 3
    for share in (0.01, 0.1, 0.5, 0.99):
        granted = grant(folder, share)
        assert not (truth["is_poison"] | truth["is_cover"]).to_numpy()[granted].any()
        sizes = [np.count_nonzero((labels == k) & ~truth["is_poison"] & ~truth["is_cover"]) for k in range(3)]
        expected = [max(1, round(share * size)) for size in sizes]
        assert np.bincount(labels[granted], minlength=3).tolist() == expected


def test_a_larger_grant_adds_and_the_seed_decides(folder):
    small, large = grant(folder, 0.1), grant(folder, 0.4)
    assert (small & large).sum() == small.sum() < large.sum()
    assert (grant(folder, 0.1) == small).all()
    assert (grant(folder, 0.1, seed=1) != small).any()


def planted_method(**members) -> SimpleNamespace:
    def score(received, settings, seed):
        return received.clean.float()  # distrusts what it was told to trust

    parts = {
        "KIND": "detector", "CLEAN": True, "NEEDS_NORM": False, "ORACLE": (), "Settings": SimpleNamespace,
        "score": score, "flag": lambda score, received, settings: score > 0, "__name__": "planted",
    }  # fmt: skip
    return SimpleNamespace(**parts | members)


@pytest.mark.parametrize("column", ["granted", "trusted", "round"])
def test_trusted_samples_reach_the_method_and_are_kept(folder, monkeypatch, column):
    monkeypatch.setattr(registry, "load", lambda family, name: planted_method())
    index = load_table(folder / "truth")["index"].to_numpy()
    trusted = np.arange(120) < 30
    table = pd.DataFrame({"index": index, column: trusted})
    if column == "round":
        table[column] = np.where(trusted, 0, -1)
    save_table(folder / "trusted", table.sample(frac=1, random_state=0))  # in any order
    defend(folder, trusted=folder / "trusted")
    found = load_table(folder / "samples")
    assert found["trusted"].tolist() == (found["score"] == 1).tolist() == trusted.tolist()
    assert found["kept"].all()


@pytest.mark.parametrize("trusted", [None, []])
def test_what_cannot_be_applied_is_a_row_with_its_reason(folder, monkeypatch, trusted):
    monkeypatch.setattr(registry, "load", lambda family, name: planted_method())
    options = {}
    if trusted is not None:
        index = load_table(folder / "truth")["index"]
        save_table(folder / "trusted", pd.DataFrame({"index": index, "granted": False}))
        options["trusted"] = folder / "trusted"
    defend(folder, **options)
    before, after = load_classifier(folder / "model"), load_classifier(folder / "out")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    identity = dict.fromkeys(
        ("pretrain", "downstream", "encoder_attack", "dataset_attack", "scenario", "defense"), "x"
    )
    none = {part: folder / "none" for part in ("predictions", "encoder_trigger", "dataset_trigger")}
    command(
        "evaluate", truth=folder / "truth", samples=folder / "samples", metrics=folder / "metrics",
        defended=folder / "defend.run.json", record=folder / "r",
        identity=json.dumps(identity | {"seed": 0}), **none,
    )  # fmt: skip
    rows = load_table(folder / "metrics")
    assert rows[["stage", "metric"]].to_numpy().tolist() == [["defense", "not_applicable"]]
    assert "trusted clean samples" in rows["note"].item() and rows["value"].isna().all()


def test_distrusting_everything_is_not_applicable(folder, monkeypatch):
    method = planted_method(
        CLEAN=False,
        score=lambda received, settings, seed: torch.zeros(120),
        flag=lambda score, received, settings: score == 0,
    )
    monkeypatch.setattr(registry, "load", lambda family, name: method)
    defend(folder)
    assert "nothing is left" in load_json(folder / "defend.run.json")["log"]["not_applicable"]


def test_scores_that_are_no_numbers_are_an_error():
    method = planted_method(score=lambda *_: torch.full((120,), torch.nan))
    with pytest.raises(RuntimeError, match="planted"):
        defense.detect(method, tiny(), None, defense.selection.Settings(), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": False}, "samples"), ({"trusted": "truth", "name": "planted"}, "granted, trusted or round")],
)
def test_bad_inputs_are_named(folder, monkeypatch, options, message):
    monkeypatch.setattr(registry, "load", lambda family, name: planted_method())
    options = {k: folder / v if k == "trusted" else v for k, v in options.items()}
    with pytest.raises(SystemExit, match=message):
        defend(folder, **options)


def test_features_that_are_no_numbers_are_refused_on_receipt(folder):
    """One such feature made SPECTRE call its class the cleanest."""
    features = tiny().features.clone()
    features[7, 3] = float("nan")
    save_tensors(folder / "features", {"features": features})
    with pytest.raises(SystemExit, match="features: features of 1 of 120 images are no numbers"):
        defend(folder)
    assert not (folder / "out").exists()


def test_a_repair_that_ends_in_no_numbers_is_not_applicable():
    def broken(received, settings, seed):
        model = copy.deepcopy(received.model)
        next(model.head.parameters()).data.fill_(float("inf"))
        return model, {}

    method = SimpleNamespace(CLEAN=False, NEEDS_NORM=False, repair=broken)
    with pytest.raises(defense.NotApplicable, match="weights that are no numbers"):
        defense.repair(method, tiny(), None, 0)
