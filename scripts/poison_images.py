"""Poisons unlabelled images ahead of pre-training: what stranger one trains the encoder on."""

import argparse
import json
from dataclasses import asdict

from tcore.data.images import read_images, write_images
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.files import save_table
from tcore.poisoning import triggers
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="images of the pre-training set (Parquet)")
    parser.add_argument(
        "--downstream", required=True, help="labelled images, some of the target class (Parquet)"
    )
    parser.add_argument("--attack", required=True, help="file name in tcore/encoder_attacks")
    parser.add_argument("--target", type=int, required=True, help="target class of the downstream task")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON object of the attack's settings"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--poisoned", required=True, help="out: the images to train on")
    parser.add_argument("--truth", required=True, help="out: which rows are poisoned")
    parser.add_argument("--trigger", required=True, help="out: the trigger")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    attack = registry.load("encoder_attacks", args.attack)
    settings = attack.Settings(**resolve(args.attack, args.settings, "--settings"))
    described = {"attack": args.attack, "target": args.target, **asdict(settings)}
    with record(args.record, "poison_images", described, args.seed) as log:
        images, downstream = read_images(args.images), read_images(args.downstream)
        trigger = attack.make_trigger(*images.pixels.shape[1:3], settings, args.seed)
        result = attack.poison_images(images, downstream, args.target, trigger, settings, args.seed)
        write_images(args.poisoned, result.images)
        save_table(args.truth, result.truth)
        triggers.save(args.trigger, result.trigger, *result.trigger_of, result.target)
        log["poisons"] = int(result.truth["is_poison"].sum())
        log["share"] = log["poisons"] / len(result.truth)
        log |= result.log


if __name__ == "__main__":
    run(main)
