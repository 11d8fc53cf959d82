"""The paper's tables: published numbers against means printed in the paper's text, comparisons by hand."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from tcore.evaluation import results
from tcore.experiment import grid
from tcore.files import InputError
from tcore.paper import comparison, tables

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "config/paper.csv"
REPORTED = tables.published(PUBLISHED)
AXES = yaml.safe_load((ROOT / "config/paper.yaml").read_text())
CELL = {
    "pretrain": "stl10_unlabeled",
    "downstream": "cifar10",
    "encoder_attack": "clean",
    "dataset_attack": "sig",
    "scenario": "T2",
    "defense": "tcore",
    "seed": 0,
}


def test_published_means_by_scenario():
    """ACC and ASR without and with T-Core over 35, 17, 17 and 119 cells, added up apart from the file."""
    found = REPORTED[REPORTED["table"].isin([9, 10, 11])]
    scenario = [grid.scenario(*pair) for pair in found[["encoder_attack", "dataset_attack"]].to_numpy()]
    means = found.groupby([scenario, "metric", "defense"])["value"].agg(["mean", "size"])
    expected = {
        ("T2", "acc"): (77.4, 83.4, 35),
        ("T2", "asr_dataset"): (57.7, 2.4, 35),
        ("T1", "acc"): (70.8, 74.7, 17),
        ("T1", "asr_encoder"): (76.4, 3.7, 17),
        ("T3", "acc"): (70.3, 78.2, 17),
        ("T3", "asr_encoder"): (86.2, 2.5, 17),
        ("T1+T2", "acc"): (70.3, 77.8, 119),
        ("T1+T2", "asr_encoder"): (72.0, 3.8, 119),
        ("T1+T2", "asr_dataset"): (53.5, 3.4, 119),
    }
    for key, (before, after, n) in expected.items():
        assert means.loc[(*key, "none"), "mean"] == pytest.approx(before, abs=0.06), key
        assert means.loc[(*key, "tcore"), "mean"] == pytest.approx(after, abs=0.06), key
        assert set(means.loc[key, "size"]) == {n}
    assert len(means) == 2 * len(expected)


def test_what_two_tables_print_is_the_same():
    """Threat 1 without a defence stands in tables 7 and 11, Threat 2 on GTSRB in 8 and 10."""
    keys = [*tables.KEYS, *tables.NUMBER]
    for one, other, shared in ((7, 11, 34), (8, 10, 14)):
        both = REPORTED[REPORTED["table"] == one].merge(REPORTED[REPORTED["table"] == other], on=keys)
        assert len(both) == shared and (both["value_x"] == both["value_y"]).all()


def test_published_poisons_among_the_seeds_at_five_ratios():
    """Cells without a poison, and poisons in all, by data set: counted in the paper apart from the file."""
    found = REPORTED[REPORTED["table"] == 5]
    counted = found.groupby("downstream")["value"].agg([lambda poisons: (poisons == 0).sum(), "sum", "size"])
    assert {
        name: tuple(row) for name, row in zip(counted.index, counted.to_numpy().tolist(), strict=True)
    } == {
        "stl10": (35, 0, 35),
        "cifar10": (35, 0, 35),
        "gtsrb": (34, 1, 35),
        "svhn": (25, 39, 35),
        "imagenet10": (34, 2, 35),
    }
    ratios = found["dataset_attack"].str.extract(r"_(\d+)$")[0].fillna("20")
    assert ratios.value_counts().to_dict() == dict.fromkeys(("10", "15", "20", "25", "30"), 35)


def test_every_published_number_has_its_cell_in_the_papers_grid():
    names = ("vit", "growth", "tis-aware", "ratios")
    overlays = [yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()) for name in names]
    cells = pd.concat([grid.cells(AXES | overlay) for overlay in ({}, *overlays)]).drop_duplicates()
    wanted = REPORTED[tables.KEYS].drop_duplicates()
    assert len(wanted.merge(cells[cells["seed"] == 0])) == len(wanted)
    assert set(REPORTED["table"]) == set(tables.TITLES)
    # 17 pairs, two scenarios, without and with T-Core, three seeds
    assert len(tables.cells(11, REPORTED, cells)) == 17 * 2 * 2 * 3


def cell(seed: int, accuracy: float, rate: float, **changes) -> pd.DataFrame:
    numbers = [
        ("test", None, "acc", accuracy, accuracy - 0.01, accuracy + 0.01),
        ("test", None, "asr_dataset", rate, rate / 2, 2 * rate),
        ("expand", 1, "poisons", 1, np.nan, np.nan),
        ("expand", 2, "poisons", 4 + seed, np.nan, np.nan),
    ]
    rows = [dict(zip(results.NUMBERS, number, strict=True)) for number in numbers]
    return results.tidy(CELL | {"seed": seed} | changes, rows)


def line(compared: pd.DataFrame, metric: str) -> pd.Series:
    own = compared[(compared[tables.KEYS] == [CELL[key] for key in tables.KEYS]).all(axis=1)]
    return own[own["metric"] == metric].iloc[0]


def test_seeds_by_hand():
    found = pd.concat([cell(0, 0.80, 0.02), cell(1, 0.84, 0.04), cell(0, 0.1, 0.9, dataset_attack="tact")])
    compared = tables.compare(10, REPORTED, found)
    assert len(compared) == (REPORTED["table"] == 10).sum()
    acc = line(compared, "acc")
    assert (acc["reported"], acc["reproduced"], acc["n"]) == (87.31, pytest.approx(82), 2)
    half = 12.7062 * 2  # Student's t with one degree of freedom, sd of the mean 2
    assert acc["low"] == pytest.approx(82 - half, abs=1e-3) and acc["high"] == 100  # a share is at most 1
    assert acc["difference"] == pytest.approx(82 - 87.31)
    missing = compared[compared["n"] == 0]
    assert len(missing) == len(compared) - 4 and missing[["reproduced", "difference"]].isna().all(axis=None)


def test_a_single_seed_has_the_interval_over_images():
    acc = line(tables.compare(10, REPORTED, cell(0, 0.80, 0.02)), "acc")
    assert (acc["low"], acc["high"]) == pytest.approx((79, 81))


def test_counts_are_those_of_the_last_step_and_no_percentages():
    poisons = line(tables.compare(6, REPORTED, pd.concat([cell(0, 0.8, 0), cell(1, 0.8, 0)])), "poisons")
    assert (poisons["reported"], poisons["reproduced"]) == (0, 4.5)
    assert poisons["high"] == pytest.approx(4.5 + 12.7062 * 0.5, abs=1e-3) and poisons["low"] == 0


def test_poisons_among_the_seeds_stand_beside_percentages():
    rows = [("sift", None, "poisons", 5, np.nan, np.nan), ("test", None, "asr_dataset", 0.9, 0.8, 1.0)]
    rows = [dict(zip(results.NUMBERS, row, strict=True)) for row in rows]
    found = results.tidy(CELL | {"dataset_attack": "tis_aware_16"}, rows)
    compared = tables.compare(12, REPORTED, found).query("n == 1").set_index("metric")
    assert compared["reported"].to_dict() == {"asr_dataset": 92.52, "poisons": 38}
    assert compared["difference"].to_dict() == {"asr_dataset": pytest.approx(-2.52), "poisons": -33}


def test_the_page_says_what_is_there():
    page = tables.markdown(10, tables.compare(10, REPORTED, cell(0, 0.80, 0.02)))
    assert "1 of 70 cells are there." in page
    assert "| tcore | ACC | 1 | 87.31 | 80.00 | \u22127.31 |" in page
    assert "| cifar10 | sig | tcore | ACC | 87.31 | 80.00 (79.00 to 81.00, n = 1) | \u22127.31 |" in page
    assert page.count("| \u2013 | \u2013 |") == 138
    widths = {row.count("|") for row in page.partition("## Cells")[2].splitlines() if row.startswith("|")}
    assert widths == {9}
    empty = tables.markdown(9, tables.compare(9, REPORTED, cell(0, 0.80, 0.02)))
    assert "0 of 238 cells are there." in empty and "Means" not in empty


def test_the_picture_shows_what_is_there():
    found = pd.concat([cell(0, 0.80, 0.02), cell(0, 0.5, 0.9, defense="none")])
    figure = comparison.draw(10, tables.compare(10, REPORTED, found))
    accuracy, rate = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ACC", "ASR, data set's trigger"]
    names = [text.get_text() for text in accuracy.get_yticklabels()]
    assert sorted(names) == ["none", "tcore"]
    published, reproduced = (line.get_xdata() for line in accuracy.lines)
    assert [published[names.index(name)] for name in ("none", "tcore")] == [84.72, 87.31]
    assert [reproduced[names.index(name)] for name in ("none", "tcore")] == pytest.approx([50, 80])
    low, high = accuracy.collections[1].get_segments()[names.index("tcore")][:, 0]
    assert (low, high) == pytest.approx((79, 81))
    assert sorted(rate.lines[1].get_xdata()) == pytest.approx([2, 90])
    assert (
        not comparison.draw(9, tables.compare(9, REPORTED, cell(0, 0.8, 0.02)))
        .axes[0]
        .lines[0]
        .get_xdata()
        .size
    )


def rows_of(page: str) -> list[list[str]]:
    """The bodies of a page's LaTeX tables, cell by cell."""
    bodies = re.findall(r"\\endfoot\n(.*?)\n\\end\{longtable\}", page, re.DOTALL)
    assert bodies
    lines = "\n".join(bodies).splitlines()
    assert all(line.endswith(r" \\") for line in lines)
    return [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines]


def test_latex_says_what_markdown_says():
    compared = tables.compare(10, REPORTED, cell(0, 0.80, 0.02))
    found = [[text.strip() for text in row] for row in rows_of(tables.latex(10, compared))]
    assert ["tcore", "ACC", "1", "87.31", "80.00", "$-$7.31"] in found
    assert ["cifar10", "sig", "tcore", "ACC", "87.31", "80.00 (79.00 to 81.00, n = 1)", "$-$7.31"] in [
        [text.replace("stl10\\_unlabeled", "x") for text in row if text != "stl10\\_unlabeled"]
        for row in found
    ]
    page = tables.markdown(10, compared)
    assert len(found) == sum(row.startswith("| ") for row in page.splitlines()) - 2 * 2  # titles and rules


def test_latex_is_escaped():
    compared = tables.compare(9, REPORTED, cell(0, 0.80, 0.02))
    compared.loc[0, "defense"] = r"50% of {a_b} & #1 \\ $x^2~y"
    page = tables.latex(9, compared)
    assert (
        r"50\% of \{a\_b\} \& \#1 \textbackslash{} \$x\textasciicircum{}2\textasciitilde{}y".replace(
            r" \textbackslash{} ", r" \textbackslash{}\textbackslash{} "
        )
        in page
    )
    text = re.sub(r"^%.*", "", page)  # the line that names the packages
    assert not re.search(r"(?<!\\)[%#_]", text) and not set(text) - set(map(chr, range(128)))
    assert len({len(row) for row in rows_of(page)}) == 1  # an ampersand in a name divides no cell


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX on this machine")
def test_latex_compiles(tmp_path):
    for number in tables.TITLES:
        (tmp_path / f"{number}.tex").write_text(
            tables.latex(number, tables.compare(number, REPORTED, cell(0, 0.80, 0.02)))
        )
    inputs = "\n".join(rf"\input{{{number}}}" for number in tables.TITLES)
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,longtable}\\usepackage[a4paper,margin=2cm]{geometry}\\begin{document}\n"
        + inputs
        + "\n\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "Overfull" not in run.stdout  # nothing sticks out into the margin


def test_a_damaged_file_of_published_numbers_is_refused(tmp_path):
    (tmp_path / "columns.csv").write_text("table,value\n2,3\n")
    with pytest.raises(InputError, match="its columns should be table, pretrain"):
        tables.published(tmp_path / "columns.csv")
    text = PUBLISHED.read_text().splitlines()
    (tmp_path / "twice.csv").write_text("\n".join([*text, text[7]]))
    with pytest.raises(InputError, match=f"line {len(text) + 1} is there twice"):
        tables.published(tmp_path / "twice.csv")


def test_a_data_set_stands_for_one_of_the_papers():
    found = tables.published(PUBLISHED, {"gtsrb": "signs"})
    pairs = {
        tuple(pair) for pair in REPORTED.loc[REPORTED["table"] == 11, ["pretrain", "downstream"]].to_numpy()
    }
    mine = {tuple(pair) for pair in found.loc[found["table"] == 11, ["pretrain", "downstream"]].to_numpy()}
    assert ("cifar10", "gtsrb") in pairs
    assert mine == {tuple("signs" if name == "gtsrb" else name for name in pair) for pair in pairs}
    assert found["value"].tolist() == REPORTED["value"].tolist()
    with pytest.raises(InputError, match="stands_for: gtsrp is in none"):
        tables.published(PUBLISHED, {"gtsrp": "signs"})
