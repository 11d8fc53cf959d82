"""Poisons a labelled data set: what stranger two hands to the user."""

import argparse
import json
from dataclasses import asdict

from tcore import registry, triggers
from tcore.cli import run
from tcore.data.images import read_images, write_images
from tcore.files import load_tensors, save_table
from tcore.run import record
from tcore.settings import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="clean labelled images (Parquet)")
    parser.add_argument("--attack", required=True, help="file name in tcore/dataset_attacks")
    parser.add_argument("--target", type=int, help="target class; clean and adaptive need none")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON object of the attack's settings"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder-trigger", help="trigger of the encoder attack, for adaptive")
    parser.add_argument("--train", required=True, help="out: images and labels as the user receives them")
    parser.add_argument("--truth", required=True, help="out: which rows are poisoned")
    parser.add_argument("--trigger", required=True, help="out: the trigger; empty for clean")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    attack = registry.load("dataset_attacks", args.attack)
    settings = attack.Settings(**resolve(args.attack, args.settings, "--settings"))
    encoder_trigger = None
    if args.encoder_trigger:
        stamp, meta = triggers.load(args.encoder_trigger)
        encoder_trigger = (stamp, load_tensors(args.encoder_trigger)[0], meta)

    with record(args.record, "poison_dataset", {"attack": args.attack, **asdict(settings)}, args.seed) as log:
        result = attack.poison(read_images(args.images), args.target, settings, args.seed, encoder_trigger)
        write_images(args.train, result.images)
        save_table(args.truth, result.truth)
        triggers.save(args.trigger, result.trigger, *result.trigger_of, result.target, result.goals)
        log["target"] = result.target
        log["poisons"], log["covers"] = (int(result.truth[flag].sum()) for flag in ("is_poison", "is_cover"))


if __name__ == "__main__":
    run(main)
