"""One of the paper's figures, from what was measured of all victims: a picture and the numbers behind it."""

import argparse

import matplotlib
import pandas as pd

from tcore.evaluation.results import need
from tcore.experiment import registry
from tcore.files import atomic, load_table
from tcore.paper.figures import _declared as paper_figure
from tcore.paper.figures import _drawing
from tcore.running.cli import run
from tcore.running.record import record

RESOLUTION = 150  # dots per inch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", required=True, choices=paper_figure.names())
    parser.add_argument("--measured", required=True, nargs="+", help="a table per victim")
    parser.add_argument("--picture", required=True, help="out: PNG")
    parser.add_argument("--csv", required=True, help="out: the numbers")
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    figure = registry.load(paper_figure.FAMILY, args.figure)
    with record(args.record, "draw_figure", {"figure": args.figure}, None) as log:
        tables = [need(load_table(path), paper_figure.IDENTITY, path) for path in args.measured]
        rows = pd.concat(tables, ignore_index=True)
        log |= {"victims": len(tables), "title": figure.TITLE, "caption": figure.CAPTION}
        with matplotlib.rc_context(_drawing.STYLE), atomic(args.picture) as temporary:
            figure.draw(rows).savefig(temporary, format="png", dpi=RESOLUTION)
        with atomic(args.csv) as temporary:
            rows.round(9).to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    run(main)
