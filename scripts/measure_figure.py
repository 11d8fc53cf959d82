"""What one of the paper's figures shows of one victim. Reads the truth, triggers and test images."""

import argparse
import json

from tcore import device as devices
from tcore.experiment import registry
from tcore.files import save_table
from tcore.paper.figures import _declared as paper_figure
from tcore.paper.figures import _victim
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", required=True, choices=paper_figure.names())
    parser.add_argument("--model", required=True, help="the undefended classifier")
    parser.add_argument("--features", required=True, help="its encoder's features of the images")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--trusted", help="table of samples that are trusted, for figures that take some")
    parser.add_argument("--truth", required=True)
    parser.add_argument("--test", required=True, help="test images (Parquet)")
    parser.add_argument("--encoder-trigger", required=True)
    parser.add_argument("--dataset-trigger", required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="JSON, settings by method")
    parser.add_argument(
        "--identity",
        type=json.loads,
        required=True,
        help=f"JSON with {', '.join(paper_figure.IDENTITY)}",
    )
    parser.add_argument("--measured", required=True, help="out: tidy rows")
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    device, seed = devices.pick(), args.identity["seed"]
    figure = registry.load(paper_figure.FAMILY, args.figure)
    with record(args.record, "measure_figure", args.settings, seed, device):
        victim = _victim.read(
            model=args.model,
            features=args.features,
            images=args.images,
            trusted=args.trusted,
            truth=args.truth,
            test=args.test,
            encoder_trigger=args.encoder_trigger,
            dataset_trigger=args.dataset_trigger,
            head=args.settings["head"],
            scenario=args.identity["scenario"],
            seed=seed,
            device=device,
        )
        rows = figure.measure(victim, args.settings)
        for position, column in enumerate(paper_figure.IDENTITY):
            rows.insert(position, column, args.identity[column])
        save_table(args.measured, rows)


if __name__ == "__main__":
    run(main)
