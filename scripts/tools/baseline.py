"""How often triggers succeed where nothing was attacked: the baseline of every attack success rate."""

import argparse
import sys
from pathlib import Path

import pandas as pd

from tcore import device as devices
from tcore.data.images import read_images
from tcore.evaluation.metrics import attack_success_rate
from tcore.files import InputError
from tcore.models.classifier import load_classifier, logits
from tcore.poisoning import triggers
from tcore.running.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a classifier from clean encoder and clean data set")
    parser.add_argument("--test", required=True, help="test images (Parquet)")
    parser.add_argument("triggers", nargs="+", help="trigger files of attacks")
    args = parser.parse_args()

    model, test = load_classifier(args.model).to(devices.pick()), read_images(args.test)
    rows = []
    for path in map(Path, args.triggers):
        stamp, meta = triggers.load(path)
        if stamp is None:
            raise InputError(f"{path}: a trigger of no attack; name those of attacks")
        found = logits(model, stamp(test.tensor)).argmax(1).cpu().numpy()
        share = attack_success_rate(found, test.labels, meta["target"])
        rows.append({"attack": meta["attack"], "target": meta["target"], **share._asdict(), "trigger": path})
    pd.DataFrame(rows).to_csv(sys.stdout, index=False, float_format="%.4f")


if __name__ == "__main__":
    run(main)
