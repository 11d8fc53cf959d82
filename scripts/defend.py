"""A baseline defence: detects suspect samples and trains a head on the rest, or makes a model of its own."""

import argparse
import json

import pandas as pd

from tcore import device as devices
from tcore.defenses import _interface as defense
from tcore.defenses import _selection as selection
from tcore.experiment import registry
from tcore.files import InputError, load_json, save_table
from tcore.models import head as heads
from tcore.models.classifier import save_classifier
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--defense", required=True, help="a file name in tcore/defenses")
    parser.add_argument("--model", required=True, help="the suspect classifier")
    parser.add_argument("--features", required=True, help="its encoder's features of the images")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--trusted", help="table of clean samples, for methods that need some")
    parser.add_argument("--oracle", help="JSON with what only an evaluator knows, for oracle variants")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help='JSON: {"defense", "part", "selection", "head"}'
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model-out", required=True, help="out: the classifier")
    parser.add_argument("--samples", help="out, of detectors: score, kept and trusted of every sample")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    method = registry.load("defenses", args.defense)
    if bool(args.samples) != (method.KIND == "detector"):
        raise InputError(f"--samples: goes with a detector; {args.defense} is of kind {method.KIND}")
    device = devices.pick()
    known = {name: load_json(args.oracle)[name] for name in method.ORACLE} if args.oracle else {}
    settings = method.Settings(**args.settings["defense"] | known)
    with record(args.record, "defend", args.settings | {"name": args.defense}, args.seed, device) as log:
        trusted = args.trusted if method.CLEAN else None
        head = heads.Settings(**args.settings["head"])
        received, images = defense.receive(
            args.model, args.features, args.images, trusted, head, device, args.settings["part"]
        )
        table = pd.DataFrame(
            {
                "index": images.index,
                "label": images.labels,
                "score": float("nan"),
                "kept": True,
                "trusted": False if trusted is None else received.clean.cpu().numpy(),
            }
        )
        try:
            if method.KIND == "detector":
                rule = selection.Settings(**args.settings["selection"])
                score, kept = defense.detect(method, received, settings, rule, args.seed)
                table = table.assign(score=score.double().cpu().numpy(), kept=kept.cpu().numpy())
                model = defense.retrain(received, kept, args.seed)
            else:
                model, found = defense.repair(method, received, settings, args.seed)
                log |= found
        except defense.NotApplicable as reason:
            model = received.model  # all that the user is left with; the evaluator reads the reason
            log["not_applicable"] = str(reason)
        save_classifier(args.model_out, model.cpu(), images.class_names)
        if args.samples:
            save_table(args.samples, table)


if __name__ == "__main__":
    run(main)
