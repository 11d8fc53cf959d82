"""Metrics against values worked out by hand, and the evaluator's rows on hand-made tables."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from tcore.evaluation import metrics, results
from tcore.files import InputError

LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2])
TRIGGERED = np.array([2, 0, 2, 2, 1, 2, 2, 0])  # target 2: of 5 others 3 are fooled, 2 keep their class
IDENTITY = {
    "pretrain": "scenes",
    "downstream": "signs",
    "encoder_attack": "badencoder",
    "dataset_attack": "badnets",
    "scenario": "T1+T2",
    "defense": "tcore",
    "seed": 0,
}


def test_rates_by_hand():
    assert metrics.accuracy(TRIGGERED, LABELS).value == 4 / 8
    assert metrics.attack_success_rate(TRIGGERED, LABELS, 2)[::3] == (3 / 5, 5)
    assert metrics.asr_all(TRIGGERED, 2)[::3] == (5 / 8, 8)
    assert metrics.robust_accuracy(TRIGGERED, LABELS, 2).value == 2 / 5


def test_rates_by_hand_of_a_source_class_and_of_all_to_all():
    only_one = [-1, 2, -1]  # of three images of class 1 two are fooled; one of two of class 0 leaks
    assert metrics.attack_success_rate(TRIGGERED, LABELS, only_one)[::3] == (2 / 3, 3)
    assert metrics.robust_accuracy(TRIGGERED, LABELS, only_one)[::3] == (1 / 3, 3)
    assert metrics.leak(TRIGGERED, LABELS, 2, only_one)[::3] == (1 / 2, 2)
    to_the_next = [1, 2, 0]  # 2 0 | 2 2 1 | 2 2 0: hits are the third, the fourth and the last
    assert metrics.attack_success_rate(TRIGGERED, LABELS, to_the_next)[::3] == (3 / 8, 8)
    assert metrics.robust_accuracy(TRIGGERED, LABELS, to_the_next)[::3] == (4 / 8, 8)
    all_to_one = [2, 2, -1]
    assert metrics.attack_success_rate(TRIGGERED, LABELS, all_to_one) == metrics.attack_success_rate(
        TRIGGERED, LABELS, 2
    )
    with pytest.raises(InputError, match="source class"):
        metrics.attack_success_rate(np.array([1]), np.array([0]), [-1, 0])


def test_target_class_images_never_count():
    changed = TRIGGERED.copy()
    changed[LABELS == 2] = [1, 0, 1]
    assert metrics.attack_success_rate(changed, LABELS, 2) == metrics.attack_success_rate(
        TRIGGERED, LABELS, 2
    )


def test_a_perfect_model_fools_nobody_but_asr_all():
    assert metrics.attack_success_rate(LABELS, LABELS, 2).value == 0
    assert metrics.asr_all(LABELS, 2).value == 3 / 8


def test_no_image_outside_the_target_class():
    with pytest.raises(InputError, match="target class 1"):
        metrics.attack_success_rate(np.array([1, 0]), np.array([1, 1]), 1)


def test_wilson_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29.
    for hits, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert metrics.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert metrics.wilson(0, 900)[0] == 0 and metrics.wilson(900, 900)[1] == 1
    assert np.isnan(metrics.wilson(0, 0)).all()


def test_t_interval_by_hand():
    # mean 2, sd 1, t(0.975, 2) = 4.302653: half width 4.302653 / sqrt(3).
    assert metrics.t_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    mean, *interval = metrics.t_interval([0.5])
    assert mean == 0.5 and np.isnan(interval).all()


def test_detection_by_hand_and_empty_side():
    flagged, poison = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    tpr, fpr = metrics.detection(flagged, poison)
    assert (tpr.value, fpr.value) == (1 / 2, 2 / 3)
    assert np.isnan(metrics.detection(flagged, np.zeros(5, bool))[0].value)


def test_purity_and_balance_by_hand():
    chosen, poison = np.array([1, 1, 1, 0], bool), np.array([0, 1, 0, 1], bool)
    cover = np.array([1, 0, 0, 0], bool)
    assert metrics.purity(chosen, poison, cover) == {
        "size": 3,
        "poisons": 1,
        "covers": 1,
        "poison_share": 1 / 3,
        "poison_recall": 1 / 2,
    }
    # 2, 1, 1 of four: entropy 1.5 bits of log2(3) = 1.5849625
    balance = metrics.class_balance(np.array([0, 0, 1, 2]), 3)
    assert balance == pytest.approx({"class_min": 1, "class_max": 2, "class_entropy": 1.5 / 1.5849625})
    assert metrics.class_balance(np.array([0, 1, 2, 0, 1, 2]), 3)["class_entropy"] == pytest.approx(1)


def _predictions(*views):
    found = {"clean": LABELS, "encoder_trigger": TRIGGERED, "dataset_trigger": np.zeros(8, int)}
    frames = [
        pd.DataFrame({"index": range(8), "label": LABELS, "view": view, "prediction": found[view]})
        for view in views
    ]
    return pd.concat(frames)


def _values(rows):
    return {(r["stage"], r["step"], r["metric"]): r["value"] for r in rows}


CLEAN, FIRST, SECOND = (
    {"attack": "clean", "target": None},
    {"attack": "a", "target": 2},
    {"attack": "b", "target": 0},
)


def test_rows_of_two_triggers():
    found = _values(
        results.test_rows(
            _predictions("clean", "encoder_trigger", "dataset_trigger"),
            {"encoder": FIRST, "dataset": SECOND},
            "badnets",
        )
    )
    assert found["test", None, "acc"] == 1
    assert found["test", None, "asr_encoder"] == 3 / 5
    assert found["test", None, "asr_dataset"] == 1
    assert found["test", None, "robust_dataset"] == 0


def test_rows_of_a_source_class_and_of_all_to_all():
    def rows(meta):
        views = _predictions("clean", "encoder_trigger")
        views["view"] = views["view"].replace("encoder_trigger", "dataset_trigger")
        return _values(results.test_rows(views, {"encoder": CLEAN, "dataset": meta}, "x"))

    found = rows({"attack": "tact", "target": 2, "goals": [-1, 2, -1]})
    assert found["test", None, "asr_dataset"] == 2 / 3
    assert found["test", None, "robust_dataset"] == 1 / 3
    assert found["test", None, "leak_dataset"] == 1 / 2
    assert found["test", None, "asr_dataset_all"] == 5 / 8
    found = rows({"attack": "badnets", "target": None, "goals": [1, 2, 0]})
    assert found["test", None, "asr_dataset"] == 3 / 8
    assert {name for _, _, name in found} == {"acc", "chance", "asr_dataset", "robust_dataset"}


def test_rows_of_no_trigger_and_of_a_shared_one():
    none = results.test_rows(_predictions("clean"), {"encoder": CLEAN, "dataset": CLEAN}, "clean")
    assert [row["metric"] for row in none] == ["acc", "chance"]
    assert none[1]["value"] == max(np.bincount(LABELS)) / 8
    shared = results.test_rows(
        _predictions("clean", "encoder_trigger", "dataset_trigger"),
        {"encoder": FIRST, "dataset": FIRST},
        "adaptive",
    )
    names = {"acc", "chance", "asr_encoder", "asr_encoder_all", "robust_encoder"}
    assert {row["metric"] for row in shared} == names


def test_a_missing_view_is_named():
    with pytest.raises(InputError, match="encoder_trigger"):
        results.test_rows(_predictions("clean"), {"encoder": FIRST, "dataset": CLEAN}, "clean")


@pytest.fixture
def stages():
    truth = pd.DataFrame({"index": [10, 11, 12, 13, 14, 15], "clean_label": 0})
    truth["is_poison"], truth["is_cover"] = [True, True, False, False, False, False], False
    seeds = pd.DataFrame({"index": truth["index"], "label": [0, 0, 0, 1, 1, 1]})
    seeds["trusted"] = [False, False, True, True, False, False]
    subset = pd.DataFrame({"index": truth["index"], "round": [-1, -1, 0, 0, 1, -1]})
    pool = pd.DataFrame({"index": truth["index"], "round": [-1, 2, 0, 0, 0, 1]})
    return truth, seeds, subset, pool


def test_stage_rows_by_hand(stages):
    found = _values(results.stage_rows(*stages))
    assert (found["data", None, "size"], found["data", None, "poisons"]) == (6, 2)
    assert (found["sift", None, "size"], found["sift", None, "poisons"]) == (2, 0)
    assert found["expand", 1, "size"] == 3
    assert (found["bootstrap", 1, "size"], found["bootstrap", 1, "poisons"]) == (4, 0)
    assert (found["bootstrap", 2, "size"], found["bootstrap", 2, "poison_recall"]) == (5, 1 / 2)
    assert found["expand", 1, "class_min"] == 1
    assert (found["bootstrap", None, "tpr"], found["bootstrap", None, "fpr"]) == (1 / 2, 0)


def test_stage_rows_ignore_row_order(stages):
    truth, *rest = stages
    assert results.stage_rows(truth, *(t.sample(frac=1, random_state=3) for t in rest)) == results.stage_rows(
        *stages
    )


def test_stage_rows_refuse_foreign_indices(stages):
    truth, seeds, subset, pool = stages
    with pytest.raises(InputError, match="pool"):
        results.stage_rows(truth, seeds, subset, pool.assign(index=pool["index"] + 1))


def test_channel_rows_in_numerical_order():
    tensors = {}
    for name, mask in (("conv10", [1.0, 0.5]), ("conv2", [0.0, 1.0, 0.2])):
        tensors |= {f"mask.{name}": torch.tensor(mask), f"untrusted.{name}": torch.tensor(mask) < 0.1}
    assert results.layers(tensors) == ["conv2", "conv10"]
    found = _values(results.channel_rows(tensors))
    assert [found["filter", 0, m] for m in ("channels", "untrusted", "mask_min")] == [3, 1, 0]
    assert found["filter", 1, "mask_mean"] == 0.75


def _cell(seed, acc, asr, **changes):
    rows = [
        {"stage": "test", "step": None, "metric": m, "value": v, "low": v - 0.1, "high": v + 0.1}
        for m, v in (("acc", acc), ("asr_encoder", asr))
    ]
    return results.tidy(IDENTITY | {"seed": seed} | changes, rows)


def _record(step, seconds, ram, gpu=None, **changes):
    return {
        "step": step, "settings": {}, "seed": 0, "versions": {"torch": "2"}, "device": "cpu",
        "seconds": seconds, "peak_ram_mb": ram, "peak_gpu_mb": gpu,
    } | changes  # fmt: skip


def test_collect_adds_up_the_defences_own_steps(tmp_path):
    own = tmp_path / "defended/scenes-badencoder/signs-badnets/0/tcore"
    other = tmp_path / "defended/scenes-badencoder/signs-badnets/1/tcore"
    shared = tmp_path / "poisoned/any/signs-badnets/0/poison_dataset.run.json"
    records = {
        own / "sift.run.json": _record("sift", 2.0, 100.0),
        own / "expand.run.json": _record("expand", 3.0, 300.0),
        other / "sift.run.json": _record("sift", 50.0, 900.0),
        shared: _record("poison_dataset", 7.0, 5000.0),
    }
    found = results.collect([_cell(0, 0.8, 0.02), _cell(1, 0.6, 0.04)], records)
    first = found[found["seed"] == 0]
    cost = first[first["stage"] == "cost"].set_index("metric")["value"].to_dict()
    assert cost == {
        "seconds": 5.0, "seconds_sift": 2.0, "seconds_expand": 3.0,
        "peak_ram_mb": 300.0, "peak_ram_mb_sift": 100.0, "peak_ram_mb_expand": 300.0,
    }  # fmt: skip
    alone = found[(found["seed"] == 1) & (found["stage"] == "cost")]  # a single step is all there is to say
    assert set(alone["metric"]) == {"seconds", "peak_ram_mb"}
    assert json.loads(first["versions"].iloc[0]) == {"torch": "2"}
    # The digest follows the settings of every step behind the cell and of no other.
    again = results.collect(
        [_cell(0, 0.8, 0.02)], records | {shared: _record("p", 7.0, 1.0, settings={"ratio": 1})}
    )
    assert again["config"].iloc[0] != first["config"].iloc[0]
    elsewhere = results.collect(
        [_cell(0, 0.8, 0.02)], records | {other / "x.run.json": _record("x", 1.0, 1.0)}
    )
    assert elsewhere["config"].iloc[0] == first["config"].iloc[0]


def test_summary_and_overview_by_hand():
    cells = [_cell(0, 0.8, 0.02), _cell(1, 0.6, 0.04), _cell(0, 0.9, 0.99, defense="none")]
    found = results.collect(cells, {})
    ((victim, own),) = results.summary(found)["T1+T2"].items()
    assert victim == "scenes-badencoder/signs-badnets"
    assert own["tcore"] == pytest.approx({"acc": 0.7, "asr_encoder": 0.03})
    lines = results.overview(found).set_index("defense")
    assert lines.loc["tcore", ["n", "acc_mean"]].tolist() == pytest.approx([2, 0.7])
    assert lines.loc["tcore", "acc_sd"] == pytest.approx(0.02**0.5)
    assert lines.loc["none", ["acc_low", "acc_high"]].tolist() == pytest.approx([0.8, 1.0])
    assert np.isnan(lines.loc["tcore", "asr_dataset_mean"])


def test_the_summary_does_not_average_over_attacks():
    blended = _cell(0, 0.8, 0.79).assign(dataset_attack="blended")
    found = results.summary(results.collect([_cell(0, 0.8, 0.03), blended], {}))["T1+T2"]
    rates = {victim: own["tcore"]["asr_encoder"] for victim, own in found.items()}
    assert rates == {"scenes-badencoder/signs-badnets": 0.03, "scenes-badencoder/signs-blended": 0.79}


def test_a_cell_named_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        results.collect([_cell(0, 0.8, 0.02), _cell(0, 0.8, 0.02)], {})


def test_an_incomplete_identity_is_refused():
    with pytest.raises(InputError, match="seed"):
        results.tidy({k: v for k, v in IDENTITY.items() if k != "seed"}, [])
