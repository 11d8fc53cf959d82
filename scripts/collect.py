"""All cells in one tidy table, the means for `dvc metrics`, and a table to look at."""

import argparse
from pathlib import Path

from tcore import results
from tcore.cli import run
from tcore.files import atomic, load_json, load_table, save_json, save_table
from tcore.run import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", nargs="+", required=True, help="metrics.parquet of every cell")
    parser.add_argument("--records", nargs="+", required=True, help="run.json of every step", type=Path)
    parser.add_argument("--results", required=True)
    parser.add_argument("--summary", required=True)
    parser.add_argument("--table", required=True)
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    with record(args.record, "collect", {}, None):
        tables = [
            results.need(load_table(path), [*results.IDENTITY, *results.NUMBERS], path)
            for path in args.metrics
        ]
        found = results.collect(tables, {path: load_json(path) for path in args.records})
        save_table(args.results, found)
        save_json(args.summary, results.summary(found))
        with atomic(args.table) as temporary:
            results.overview(found).to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    run(main)
