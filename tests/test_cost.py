"""Costs before a run: planted records and commands with the hours that follow by hand."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tcore.experiment import cost
from tcore.files import save_json

ROOT = Path(__file__).resolve().parents[1]
SIFT = {"sift": {"neighbours": 5}}
CELL = "scenes-badencoder/{0}-badnets/0"


def command(script: str, record: str, settings: dict | None = None) -> str:
    given = f" --settings '{json.dumps(settings)}'" if settings else ""
    return (
        f'Shell command: python "$TCORE"/scripts/{script}.py{given} --seed 0 --record data/{record}'
        " > data/logs/x 2>&1"
    )


def estimate(commands: list[str], data: Path, images: dict[str, int] | None = None) -> pd.DataFrame:
    return cost.estimate(cost.planned("\n".join(commands)), cost.known(data), images or cost.sizes(data))


@pytest.fixture
def data(tmp_path):
    """Two records of a sifting on `signs`, 10 and 14 seconds, with 100 training images; one of a defence."""
    path = tmp_path / "data"
    (path / "datasets/signs").mkdir(parents=True)
    pd.DataFrame({"index": range(100)}).to_parquet(path / "datasets/signs/train.parquet")
    for seed, seconds in ((0, 10), (1, 14)):
        place = path / f"defended/scenes-badencoder/signs-badnets/{seed}/tcore/sift.run.json"
        save_json(place, {"step": "sift", "settings": SIFT | {"seen": 1}, "seconds": seconds})
    place = path / "defended/scenes-clean/signs-badnets/0/ac/defend.run.json"
    save_json(place, {"step": "defend", "settings": {"name": "ac"}, "seconds": 50})
    return path


def test_what_a_path_says():
    cell = f"{CELL.format('signs')}/ac"
    assert cost.place(f"defended/{cell}/given/grant_clean.run.json") == {
        "method": "ac", "dataset": "signs", "scenario": "T1+T2"
    }  # fmt: skip
    assert cost.place("defended/a-clean/b-clean/3/extract_features.run.json")["scenario"] == "clean"
    assert cost.place("poisoned/a-drupe/b-adaptive/3/poison_dataset.run.json")["method"] == "adaptive"
    assert cost.place("encoders/a-clean/3/pretrain_encoder.run.json")["dataset"] == "a"
    assert cost.place("results/collect.run.json") == {"method": "", "dataset": "", "scenario": "shared"}


def test_the_nearest_record_counts(data):
    paths = {name: f"defended/{CELL.format(name)}/tcore/sift.run.json" for name in ("signs", "digits")}
    other = {"sift": {"neighbours": 6}}
    found = estimate(
        [
            command("sift", paths["signs"], SIFT),
            command("sift", paths["digits"], SIFT),
            command("sift", paths["signs"], other),
            command("defend", f"defended/{CELL.format('signs')}/ct/defend.run.json"),
            command("paint", "results/paint.run.json"),
        ],
        data,
        {"signs": 100, "digits": 250},
    )
    assert found["basis"].tolist() == list(cost.BASES)
    # 12 s on average; 2.5 times the images; the same with other settings; the other defence's 50 s; nothing
    assert found["seconds"][:4].tolist() == [cost.START + s for s in (12, 30, 12, 50)]
    assert np.isnan(found["seconds"][4])
    page = cost.report(found)
    assert re.search(r"^paint +1 +\? ", page, re.MULTILINE)
    assert "5 jobs, 0.03 hours" in page and "0.02 of these hours" in page and "1 jobs have never" in page


def test_steps_without_a_record_are_those_of_the_demo(data):
    found = estimate(
        [command("train_head", f"defended/{CELL.format('signs')}/none/train_head.run.json")], data
    )
    standard = pd.read_csv(cost.STANDARD).query("step == 'train_head'").iloc[0]
    expected = cost.START + standard["seconds"] * 100 / standard["images"]
    assert found["seconds"][0] == pytest.approx(expected) and found["basis"][0] == "elsewhere"


def run(monkeypatch, *arguments: str) -> None:
    script = ROOT / "scripts/tools/estimate_cost.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(script), run_name="__main__")


def test_the_demo_is_measured_in_every_step(monkeypatch, capsys):
    run(monkeypatch, "--data", "nowhere", "--", "--forceall")
    found = capsys.readouterr().out
    assert "bootstrap" in found and "unknown" not in found and "another method" not in found


def test_no_plan_is_an_error(monkeypatch):
    with pytest.raises(SystemExit, match=r"(?s)there is no plan.*tabel_2"):
        run(monkeypatch, "tabel_2")
