"""The evaluator's test of a detector in use: its scores for clean and triggered test images."""

import argparse
import json

import pandas as pd
import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.defenses import _interface as defense
from tcore.experiment import registry
from tcore.files import save_table
from tcore.models import head as heads
from tcore.poisoning import triggers
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--defense", required=True, help="a file name in tcore/defenses")
    parser.add_argument("--model", required=True, help="the suspect classifier")
    parser.add_argument("--features", required=True, help="its encoder's features of the training images")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--trusted", help="table of clean samples, for methods that need some")
    parser.add_argument("--settings", type=json.loads, required=True, help='JSON: {"defense", "head"}')
    parser.add_argument("--test", required=True, help="test images (Parquet)")
    parser.add_argument("--encoder-trigger", required=True)
    parser.add_argument("--dataset-trigger", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument(
        "--inputs", required=True, help="out: score and flag per view and test image; none if n/a"
    )
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device, method = devices.pick(), registry.load("defenses", args.defense)
    with record(args.record, "score_inputs", args.settings | {"name": args.defense}, args.seed, device):
        trusted = args.trusted if method.CLEAN else None
        head = heads.Settings(**args.settings["head"])
        received, _ = defense.receive(args.model, args.features, args.images, trusted, head, device)
        settings, test = method.Settings(**args.settings["defense"]), read_images(args.test)
        views = {"clean": test.tensor}
        for view in ("encoder_trigger", "dataset_trigger"):
            stamp, _ = triggers.load(getattr(args, view))
            if stamp is not None:
                views[view] = stamp(test.tensor)
        table = pd.DataFrame({"index": [], "label": [], "view": [], "score": [], "flagged": []})
        try:
            defense.check(method, received)
            score = [method.score_inputs(v.to(device), received, settings, args.seed) for v in views.values()]
            flagged = defense.flag_inputs(method, torch.cat(score), received, settings, args.seed)
            named = [
                pd.DataFrame({"index": test.index, "label": test.labels, "view": view}) for view in views
            ]
            table = pd.concat(named, ignore_index=True).assign(
                score=torch.cat(score).double().cpu().numpy(), flagged=flagged.cpu().numpy()
            )
        except defense.NotApplicable:
            pass  # the evaluator reads the reason elsewhere
        save_table(args.inputs, table)


if __name__ == "__main__":
    run(main)
