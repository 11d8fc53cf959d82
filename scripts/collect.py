"""All cells in one tidy table, the means for `dvc metrics`, and a table to look at.

The grid travels as its axes and not as a list of files: a command line has room for some 300 paths.
"""

import argparse
import json
from pathlib import Path

from tcore.evaluation import results
from tcore.experiment import grid
from tcore.files import atomic, save_json, save_table
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", required=True, type=json.loads, help=f"JSON with {', '.join(grid.AXES)}")
    parser.add_argument(
        "--data", required=True, type=Path, help="the data folder (docs/develop/architecture.md)"
    )
    parser.add_argument("--available", action="store_true", help="leave out cells that are not there yet")
    parser.add_argument("--results", required=True)
    parser.add_argument("--summary", required=True)
    parser.add_argument("--table", required=True)
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    with record(args.record, "collect", {}, None):
        found = results.collect(*results.read(args.data, grid.cells(args.grid), args.available))
        save_table(args.results, found)
        save_json(args.summary, results.summary(found))
        with atomic(args.table) as temporary:
            results.overview(found).to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    run(main)
