"""Many cells at once, on planted results: means, intervals, ranks by hand; a page for 1 as for hundreds."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_report import Tags

from tcore.evaluation import leaderboard, results
from tcore.experiment import grid
from tcore.report import report

TEMPLATE = Path(__file__).resolve().parents[1] / "workflow/report.html.jinja"
NAMES = {"pretrain": "scenes", "downstream": "signs", "encoder_attack": "clean", "dataset_attack": "badnets"}


def cell(defense: str, acc: float, rate: float, seconds: float = 1.0, seed: int = 0, **names) -> pd.DataFrame:
    """One cell's rows: `rate` for its triggers, half of it for the second of two; T-Core with its stages."""
    identity = NAMES | names
    scenario = grid.scenario(identity["encoder_attack"], identity["dataset_attack"])
    identity |= {"scenario": scenario, "defense": defense, "seed": seed}
    numbers = [("test", None, "acc", acc)]
    if identity["encoder_attack"] != "clean":
        numbers.append(("test", None, "asr_encoder", rate))
    if identity["dataset_attack"] not in ("clean", "adaptive"):
        numbers.append(("test", None, "asr_dataset", rate / 2 if scenario == "T1+T2" else rate))
    numbers += [("test", None, "chance", 0.1), ("cost", None, "seconds", seconds)]
    if defense == "tcore":
        for stage, step, size in (
            ("data", None, 100),
            ("sift", None, 5),
            ("bootstrap", 1, 50),
            ("bootstrap", 2, 90),
        ):
            numbers += [(stage, step, "size", size), (stage, step, "poisons", size // 20)]
    rows = [dict(zip(results.NUMBERS, (*n, np.nan, np.nan), strict=True)) for n in numbers]
    return results.tidy(identity, rows).assign(config="c0ffee", versions="{}")


def many(attacks: int = 6, defenses: int = 7, seeds: int = 2) -> pd.DataFrame:
    """Four scenarios; every defence is worse than the one before it."""
    on_encoders, on_sets = ("badencoder", "drupe"), [f"badnets_{i}" for i in range(attacks)]
    pairs = [("clean", d) for d in on_sets] + list(product(on_encoders, ["clean", "adaptive", *on_sets]))
    names = ["none", "tcore", *(f"defence_{i}" for i in range(defenses - 2))]
    random = np.random.default_rng(0)
    return pd.concat(
        cell(
            name, 0.9 - 0.01 * k, (0.95 if k == 0 else 0.05 * k) + 0.02 * random.random(), 10 * 1.4**k, seed,
            encoder_attack=e, dataset_attack=d,
        )
        for (e, d), (k, name), seed in product(pairs, enumerate(names), range(seeds))
    )  # fmt: skip


def build(found: pd.DataFrame, data: Path) -> tuple[dict, str]:
    context = report.build(found.reset_index(drop=True), data)
    return context, report.render(context, TEMPLATE)


@pytest.fixture
def two():
    """T2 by two attacks with two seeds, T1+T2 with one; of T2's second attack `ac` has one seed only."""
    parts = []
    for seed in (0, 1):
        parts += [cell("none", 0.9, 1.0, seed=seed), cell("none", 0.9, 0.8, seed=seed, dataset_attack="sig")]
        parts += [cell("ac", 0.88, 0.04 + 0.02 * seed, 3, seed), cell("ct", 0.80, 0.02, 50, seed)]
        parts += [cell("ct", 0.89, 0.08, 70, seed, dataset_attack="sig")]
    parts += [cell("ac", 0.86, 0.5, 5, dataset_attack="sig")]
    parts += [cell(d, 0.9, r, encoder_attack="drupe") for d, r in (("none", 0.9), ("ac", 0.3), ("ct", 0.1))]
    return pd.concat(parts, ignore_index=True)


def test_boards_by_hand(two, tmp_path):
    boards = build(two, tmp_path)[0]["comparison"]["boards"]
    assert [board["scenario"] for board in boards] == ["T2", "T1+T2"]
    ac, ct = (next(line for line in boards[0]["lines"] if line["defense"] == d) for d in ("ac", "ct"))
    assert [line["defense"] for line in boards[0]["lines"]] == ["ct", "ac", "none"]  # equal in cases held
    assert (ac["victims"], ac["held"], ct["held"]) == (
        2,
        1,
        1,
    )  # ac misses sig, ct loses 10 points on badnets
    assert ac["asr"]["mean"] == pytest.approx((0.05 + 0.5) / 2) and ac["worst"] == 0.5
    # the interval is of badnets alone, which has both seeds: 0.05, sd of the mean 0.01, one degree of freedom
    assert (ac["asr"]["low"], ac["asr"]["high"]) == pytest.approx((0, 0.05 + 12.7062 * 0.01), abs=1e-4)
    assert ct["asr"]["mean"] == pytest.approx(0.05) and ct["change"] == pytest.approx(-0.055)
    assert ct["seconds"] == 60
    single = boards[1]["lines"][-2]
    assert single["defense"] == "ac" and np.isnan(single["asr"]["low"])


def test_heatmaps_by_hand(two, tmp_path):
    context, page = build(two, tmp_path)
    asr, acc = context["comparison"]["heatmaps"]
    assert asr["defenses"] == ["none", "ac", "ct"]
    line = next(line for line in asr["lines"] if line["scenario"] == "T1+T2")
    assert [cell["value"] for cell in line["cells"]] == pytest.approx(
        [0.9, 0.3, 0.1]
    )  # of two triggers the worse
    line = next(
        line for line in acc["lines"] if line["dataset_attack"] == "badnets" and line["scenario"] == "T2"
    )
    assert [cell["shade"] for cell in line["cells"]] == pytest.approx([0, 0.02 / 0.3, 0.1 / 0.3])
    for map_ in (asr, acc):  # every number leads to the row that it is of
        for line in map_["lines"]:
            for defense, found in zip(map_["defenses"], line["cells"], strict=True):
                row = context["rows"][found["row"]]
                assert (row["defense"], row["dataset_attack"]) == (defense, line["dataset_attack"])
    tags = Tags(page)
    anchors = {f"#r{n}" for n in range(len(context["rows"]))}
    assert not tags.open and {link for link in tags.links if link.startswith("#r")} == anchors


def test_a_defence_that_leaves_a_guessing_model_has_not_held(tmp_path):
    """No trigger succeeds, and no accuracy is lost where there was none."""
    parts = [cell("none", 0.11, 0.9), cell("strip", 0.11, 0.0), cell("ac", 0.21, 0.0)]
    context, page = build(pd.concat(parts), tmp_path)
    held = {row["defense"]: row["held"] for row in context["rows"]}
    assert held == {"none": False, "strip": False, "ac": True}
    assert page.count("✕ accuracy near chance") == 1 and "strip leaves a model that guesses: 11.0" in page
    (board,) = context["comparison"]["boards"]
    assert {line["defense"]: line["held"] for line in board["lines"]} == {"ac": 1, "strip": 0, "none": 0}


def test_pairs_are_averaged(tmp_path):
    other = {"pretrain": "photos"}
    found = pd.concat(
        [cell(d, 0.9, r, **n) for d, r, n in product(("none", "ac", "ct"), (0.2,), ({},))]
        + [cell(d, 0.7, 0.6, **other) for d in ("none", "ac")]
    )
    asr, acc = build(found, tmp_path)[0]["comparison"]["heatmaps"]
    cells = asr["lines"][0]["cells"]
    assert [(c["value"], c["n"]) for c in cells] == [
        (pytest.approx(0.4), 2),
        (pytest.approx(0.4), 2),
        (0.2, 1),
    ]
    assert [c["value"] for c in acc["lines"][0]["cells"]] == pytest.approx([0.8, 0.8, 0.9])


def test_cost_and_benefit_by_hand(two, tmp_path):
    ac, ct = leaderboard.benefits(build(two, tmp_path)[0]["rows"])
    assert (ac["name"], ac["seconds"], ac["drop"]) == ("ac", 3, pytest.approx((0.95 + 0.3 + 0.6) / 3))
    assert (ct["name"], ct["drop"]) == ("ct", pytest.approx((0.98 + 0.72 + 0.8) / 3))


def test_one_cell_and_one_defence_are_as_simple_as_ever(tmp_path):
    for found in (cell("none", 0.9, 0.9), pd.concat([cell("none", 0.9, 0.9), cell("tcore", 0.9, 0.0)])):
        context, page = build(found, tmp_path)
        assert not context["comparison"] and not context["large"]
        assert "side by side" not in page and 'id="r0"' not in page and not Tags(page).open


def test_hundreds_of_cells(tmp_path):
    found = many()
    context, page = build(found, tmp_path)
    assert len(found.drop_duplicates(results.IDENTITY)) == 22 * 7 * 2
    assert context["large"] and not context["charts"] and not Tags(page).open
    assert len(context["text"]["failed"]) == report.FAILURES + 1
    for board in context["comparison"]["boards"]:  # planted: T-Core, then in the order of the names
        names = [line["defense"] for line in board["lines"]]
        assert names[:2] == ["tcore", "defence_0"], names
    assert len(context["details"]) == 22  # a purity curve for every victim of T-Core, without any file
    anchors = {link for link in Tags(page).links if link.startswith("#v")}
    assert anchors == {f"#v{n}" for n in range(22)} and all(f'id="{a[1:]}"' in page for a in anchors)
    assert len(page) < 5_000_000
