"""Writes the tables and pictures of docs/lab from the numbers in docs/lab/data.

A page `docs/lab/<page>.md` has its numbers in `docs/lab/data/<page>.csv`, one a row: study, cell, seed,
setting, metric, value, commit. In the page a comment says what to show, and what follows it is written anew:

    <!-- lab study=depths rows=setting columns=metric -->
    (the table)
    <!-- /lab -->

`rows` and `columns` name columns of the CSV whose values become the heads of rows and columns, joined where
there are several. `cell=`, `seed=`, `setting=` or `metric=` keep what has one of the values, separated by
`|`. Numbers that fall into one place stand beside each other, in the file's order. `picture=name.png` draws
the numbers as dots instead, a line for each of `rows` and a colour for each of `columns`; `title=` is its
title.

    python scripts/tools/lab.py            # writes what is out of date
    python scripts/tools/lab.py --check    # says what is, and ends with 1
"""

import argparse
import hashlib
import re
import shlex
import sys
from pathlib import Path

import pandas as pd
from PIL import Image

LAB = Path(__file__).resolve().parents[2] / "docs" / "lab"
COLUMNS = ["study", "cell", "seed", "setting", "metric", "value", "commit"]
BLOCK = re.compile(r"<!-- lab (.*?) -->\n(.*?)<!-- /lab -->", re.DOTALL)
OPTIONS = {"rows", "columns", "picture", "title"}


def data(page: Path) -> pd.DataFrame:
    """The numbers of a page, as text."""
    found = pd.read_csv(page.parent / "data" / f"{page.stem}.csv", dtype=str, keep_default_na=False)
    if list(found.columns) != COLUMNS:
        raise SystemExit(f"error: {page.stem}.csv has the columns {list(found.columns)}, not {COLUMNS}")
    return found


def options(text: str) -> dict[str, str]:
    found = dict(part.split("=", 1) for part in shlex.split(text))
    if unknown := found.keys() - OPTIONS - {*COLUMNS}:
        raise SystemExit(f"error: <!-- lab {text} -->: unknown {', '.join(sorted(unknown))}")
    return found


def chosen(numbers: pd.DataFrame, asked: dict[str, str]) -> pd.DataFrame:
    """The rows that a comment asks for; an error where there are none."""
    for column in COLUMNS:
        if column in asked:
            numbers = numbers[numbers[column].isin(asked[column].split("|"))]
    if numbers.empty:
        raise SystemExit(f"error: no number for {asked}")
    return numbers


def heads(numbers: pd.DataFrame, names: str) -> pd.Series:
    return numbers[names.split(",")].agg(lambda row: ", ".join(filter(None, row)), axis=1)


def table(numbers: pd.DataFrame, asked: dict[str, str]) -> str:
    """Markdown; a row and a column for each value, in the order of the file."""
    names = asked["rows"].split(",")
    rows = numbers[names].apply(tuple, axis=1)
    columns = heads(numbers, asked["columns"])
    cells = numbers.groupby([rows, columns], sort=False)["value"].agg(", ".join)
    lines = [[*names, *columns.unique()], ["---"] * len(names) + ["---:"] * columns.nunique()]
    lines += [[*row, *(cells.get((row, column), "") for column in columns.unique())] for row in rows.unique()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def digest(numbers: pd.DataFrame, asked: dict[str, str]) -> str:
    text = f"{sorted(asked.items())}\n{numbers.to_csv(index=False)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drawn(path: Path) -> str | None:
    """The digest of what a picture shows."""
    return Image.open(path).info.get("lab") if path.is_file() else None


def draw(path: Path, numbers: pd.DataFrame, asked: dict[str, str]) -> None:
    """A dot for each number; those that are none ("n/a") are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    value = pd.to_numeric(numbers["value"], errors="coerce")
    rows, series = heads(numbers, asked["rows"]), heads(numbers, asked["columns"])
    places = {name: place for place, name in enumerate(reversed(rows.unique().tolist()))}
    figure = Figure(figsize=(8, 1.4 + 0.34 * len(places)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = series.unique().tolist()
    for number, name in enumerate(names):
        own = series == name
        shift = 0.24 * ((number + 0.5) / len(names) - 0.5)
        marker = "oXs^Dv"[number % 6]
        axes.scatter(value[own], rows[own].map(places) + shift, label=name, marker=marker, s=34, alpha=0.8)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_xlabel(", ".join(numbers["metric"].unique()))
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(asked.get("title", ""), loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"lab": digest(numbers, asked)})


def written(page: Path) -> tuple[str, dict[Path, tuple]]:
    """The page as it should be, and what its pictures show by path."""
    numbers, pictures = data(page), {}

    def block(found: re.Match) -> str:
        asked = options(found[1])
        own = chosen(numbers, asked)
        if "picture" in asked:
            pictures[page.parent / "pictures" / asked["picture"]] = (own, asked)
            body = f"![{asked.get('title', page.stem)}](pictures/{asked['picture']})\n"
        else:
            body = table(own, asked)
        return f"<!-- lab {found[1]} -->\n\n{body}\n<!-- /lab -->"

    return BLOCK.sub(block, page.read_text()), pictures


def pages() -> list[Path]:
    return sorted(page for page in LAB.glob("*.md") if page.name != "index.md")


def stale(page: Path) -> list[Path]:
    """What of a page is out of date: the page itself, its pictures."""
    text, pictures = written(page)
    found = [path for path, shown in pictures.items() if drawn(path) != digest(*shown)]
    return [page, *found] if text != page.read_text() else found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    found = [path for page in pages() for path in stale(page)]
    for path in found:
        print(path.relative_to(LAB.parents[1]))
    if args.check:
        sys.exit(bool(found))
    for page in pages():
        text, pictures = written(page)
        page.write_text(text)
        for path, shown in pictures.items():
            if path in found:
                draw(path, *shown)


if __name__ == "__main__":
    main()
