"""The scenario grants a defender some clean samples of the training set. Reads the truth."""

import argparse

import numpy as np
import pandas as pd

from tcore.evaluation.results import need
from tcore.files import load_table, save_table
from tcore.poisoning import poisoned
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--truth", required=True)
    parser.add_argument("--share", type=float, required=True, help="of each class, of its clean samples")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--granted", required=True, help="out: `granted` marks the clean samples to trust")
    parser.add_argument("--record", required=True)
    args = parser.parse_args()

    with record(args.record, "grant_clean", {"share": args.share}, args.seed):
        truth = need(load_table(args.truth), ["index", "clean_label", "is_poison", "is_cover"], args.truth)
        untouched = ~(truth["is_poison"] | truth["is_cover"]).to_numpy(bool)
        labels = truth["clean_label"].to_numpy()
        granted = np.zeros(len(truth), bool)
        for k in np.unique(labels):
            eligible = untouched & (labels == k)
            n = min(max(1, round(args.share * eligible.sum())), eligible.sum())
            granted[poisoned.choose(eligible, n, args.seed, "granted", int(k))] = True
        save_table(args.granted, pd.DataFrame({"index": truth["index"], "granted": granted}))


if __name__ == "__main__":
    run(main)
