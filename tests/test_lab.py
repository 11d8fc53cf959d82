"""The lab pages: every number on them stands in a CSV file beside them."""

import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
LAB = runpy.run_path(str(ROOT / "scripts/tools/lab.py"))
PAGES = LAB["pages"]()
KEY = ["study", "cell", "seed", "setting", "metric"]
# What counts things that have numbers for names, and what stands in code or in a link.
THINGS = "phases?|tables?|figures?|sections?|algorithms?|equations?|seeds?"
NAMED = re.compile(rf"\b({THINGS}) \d+(,? (and|to) \d+)*", re.I)

APART = re.compile(r"`[^`]*`|\]\([^)]*\)|<[^>]*>")
NUMBER = re.compile(r"(?<![\w.,\u2212-])\d[\d,]*(\.\d+)?(?![\w])")


def numbers(text: str) -> set[float]:
    return {float(found[0].replace(",", "")) for found in NUMBER.finditer(text.replace(", ", " ; "))}


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: page.stem)
def page(request):
    return request.param


def test_there_are_pages():
    assert len(PAGES) > 5


def test_tables_and_pictures_are_those_of_the_data(page):
    assert LAB["stale"](page) == [], "run: python scripts/tools/lab.py"


def test_numbers_in_sentences_are_in_the_data_too(page):
    text = APART.sub(" ", NAMED.sub(" ", LAB["BLOCK"].sub(" ", page.read_text())))
    known = set().union(*(numbers(cell) for row in LAB["data"](page).to_numpy() for cell in row[:6]))
    assert sorted(numbers(text) - known) == []


def test_the_data_are_tidy_and_all_shown(page):
    data = LAB["data"](page)
    assert not data[data.duplicated(KEY)].to_dict("records")
    values = data["value"][data["value"] != "n/a"]
    assert pd.to_numeric(values).notna().all()
    assert data["commit"].str.fullmatch("[0-9a-f]{7}").all()
    assert (data[["study", "cell", "metric"]] != "").all(axis=None)
    shown = {LAB["options"](found[1])["study"] for found in LAB["BLOCK"].finditer(page.read_text())}
    assert shown == set(data["study"])


def test_every_file_of_numbers_has_its_page():
    assert {path.stem for path in (ROOT / "docs/lab/data").glob("*.csv")} == {page.stem for page in PAGES}


def test_a_number_that_is_nowhere_is_found():
    assert numbers("ASR 7.5 of 1,200 and T1, T2, ResNet-18, 3x") == {7.5, 1200}
    assert numbers(NAMED.sub("", "seeds 0, 1 and phase 3")) == {1}


def test_the_readmes_results_are_those_of_the_lab():
    lines = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "→" in line and line[:3] == "| T"
    ]
    told = {number for line in lines for number in re.findall(r"\d+\.\d", line)}
    data = LAB["data"](ROOT / "docs/lab/photographs.md")
    assert len(lines) == 5 and told <= set(data.loc[data["seed"] == "0-2", "value"])
