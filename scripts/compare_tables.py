"""One table of the paper, published and reproduced side by side; cells that are not there are dashes."""

import argparse
import json
from pathlib import Path

import pandas as pd

from tcore.evaluation import results
from tcore.experiment import grid
from tcore.files import atomic, load_table, require
from tcore.paper import comparison, tables
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", required=True, type=int, choices=tables.TITLES)
    parser.add_argument("--published", required=True, help="config/paper.csv")
    parser.add_argument("--grid", required=True, type=json.loads, help=f"JSON with {', '.join(grid.AXES)}")
    parser.add_argument(
        "--names",
        type=json.loads,
        default={},
        help="JSON: the paper's data sets to those that stand for them",
    )
    parser.add_argument(
        "--data", required=True, type=Path, help="the data folder (docs/develop/architecture.md)"
    )
    parser.add_argument("--markdown", required=True)
    parser.add_argument("--latex", required=True)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--picture", required=True, help="out: PNG")
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    with record(args.record, "compare_tables", {"table": args.table}, None) as log:
        reported = tables.published(require(args.published), args.names)
        own = tables.cells(args.table, reported, grid.cells(args.grid))
        paths = [
            args.data / results.folders(cell)["results"] / "metrics.parquet"
            for cell in own.to_dict("records")
        ]
        there = [path for path in paths if path.is_file()]
        log |= {"cells": len(paths), "there": len(there)}
        empty = pd.DataFrame(columns=[*results.IDENTITY, *results.NUMBERS])
        read = [results.need(load_table(path), [*results.IDENTITY, *results.NUMBERS], path) for path in there]
        if "cost" in set(reported.loc[reported["table"] == args.table, "stage"]):
            read += [
                results.own_costs(args.data, cell)
                for cell, path in zip(own.to_dict("records"), paths, strict=True)
                if path.is_file()
            ]
        compared = tables.compare(args.table, reported, pd.concat(read) if read else empty)
        with atomic(args.csv) as temporary:
            compared.to_csv(temporary, index=False, float_format="%.6g")
        with atomic(args.picture) as temporary:
            comparison.draw(args.table, compared).savefig(temporary, format="png", dpi=150)
        for path, write in ((args.markdown, tables.markdown), (args.latex, tables.latex)):
            with atomic(path) as temporary:
                temporary.write_text(write(args.table, compared), encoding="utf-8")


if __name__ == "__main__":
    run(main)
