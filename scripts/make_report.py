"""One HTML file that shows what was run and what came out. Reads everything, the truth included."""

import argparse
import json
from pathlib import Path

from tcore.evaluation import results
from tcore.experiment import grid
from tcore.files import atomic, load_table
from tcore.report import report
from tcore.running.cli import run
from tcore.running.record import record

TEMPLATE = Path(__file__).resolve().parents[1] / "workflow" / "report.html.jinja"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", required=True, help="results.parquet of all cells")
    parser.add_argument(
        "--data", required=True, type=Path, help="the data folder (docs/develop/architecture.md)"
    )
    parser.add_argument("--grid", required=True, type=json.loads, help=f"JSON with {', '.join(grid.AXES)}")
    parser.add_argument("--output", required=True)
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    with record(args.record, "make_report", {}, None):
        columns = [*results.IDENTITY, *results.NUMBERS, "config", "versions"]
        found = results.need(load_table(args.results), columns, args.results)
        page = report.render(report.build(found, args.data, len(grid.cells(args.grid))), TEMPLATE)
        with atomic(args.output) as temporary:
            temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run(main)
