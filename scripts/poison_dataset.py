"""Poisons a labelled data set: what stranger two hands to the user."""

import argparse
import json
from dataclasses import asdict

from tcore import device as devices
from tcore.data.images import read_images, write_images
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.files import InputError, load_tensors, save_table
from tcore.poisoning import triggers
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="clean labelled images (Parquet)")
    parser.add_argument("--attack", required=True, help="file name in tcore/dataset_attacks")
    parser.add_argument("--target", type=int, help="target class; clean and adaptive need none")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON object of the attack's settings"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder-trigger", help="the encoder attack's, for attacks that are told it")
    parser.add_argument("--encoder", help="the user's encoder, for attacks that are told it; with --user")
    parser.add_argument(
        "--user", type=json.loads, help='JSON: {"head": settings, "sift": settings} of the user'
    )
    parser.add_argument("--train", required=True, help="out: images and labels as the user receives them")
    parser.add_argument("--truth", required=True, help="out: which rows are poisoned")
    parser.add_argument("--trigger", required=True, help="out: the trigger; empty for clean")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    attack = registry.load("dataset_attacks", args.attack)
    settings = attack.Settings(**resolve(args.attack, args.settings, "--settings"))
    described, known, device = {"attack": args.attack, **asdict(settings)}, {}, None
    told = getattr(attack, "TOLD", None)
    if told and not getattr(args, told):
        raise InputError(f"{args.attack} is told of the encoder: give --{told.replace('_', '-')}")
    if told == "encoder_trigger":
        stamp, meta = triggers.load(args.encoder_trigger)
        known = {"encoder_trigger": (stamp, load_tensors(args.encoder_trigger)[0], meta)}
    elif told == "encoder":
        device = devices.pick()
        described["user"] = args.user
        known = {"encoder": args.encoder, "user": args.user, "device": device}

    with record(args.record, "poison_dataset", described, args.seed, device) as log:
        result = attack.poison(read_images(args.images), args.target, settings, args.seed, **known)
        write_images(args.train, result.images)
        save_table(args.truth, result.truth)
        triggers.save(args.trigger, result.trigger, *result.trigger_of, result.target, result.goals)
        log["target"] = result.target
        log["poisons"], log["covers"] = (int(result.truth[flag].sum()) for flag in ("is_poison", "is_cover"))
        log |= result.log


if __name__ == "__main__":
    run(main)
