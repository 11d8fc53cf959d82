"""Tells a defender what nobody can know: for oracle variants of a defence. Reads the truth."""

import argparse

from tcore.evaluation.results import need
from tcore.files import load_table, save_json
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--truth", required=True)
    parser.add_argument("--oracle", required=True, help="out (JSON): poison_rate, share of the training set")
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    with record(args.record, "reveal_rate", {}, None):
        truth = need(load_table(args.truth), ["is_poison"], args.truth)
        save_json(args.oracle, {"poison_rate": float(truth["is_poison"].mean())})


if __name__ == "__main__":
    run(main)
