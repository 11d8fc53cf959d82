"""T-Core, stage 1b: lets the seed samples grow to the clean subset."""

import argparse
import json

import pandas as pd
import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.files import load_table, load_tensors, save_table
from tcore.models import head as heads
from tcore.running.cli import run
from tcore.running.record import record
from tcore.stages import expand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", required=True, help="the encoder's features of the images")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--seeds", required=True, help="table of samples: `trusted`, `in_core`")
    parser.add_argument("--settings", type=json.loads, required=True, help='JSON: {"expand", "head"}')
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument(
        "--subset", required=True, help="out: round in which each sample joined, -1 for never"
    )
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    settings = expand.Settings(**args.settings["expand"])
    head = heads.Settings(**args.settings["head"])
    with record(args.record, "expand", args.settings, args.seed, device) as log:
        images = read_images(args.images)
        features = load_tensors(args.features)[0]["features"].to(device)
        sifted = load_table(args.seeds)
        trusted, core = (
            torch.from_numpy(sifted[name].to_numpy(copy=True)).to(device) for name in ("trusted", "in_core")
        )
        labels = images.targets.to(device)
        rounds, found = expand.expand(
            features, labels, trusted, core, images.num_classes, settings, head, args.seed
        )
        save_table(args.subset, pd.DataFrame({"index": images.index, "round": rounds.cpu().numpy()}))
        log |= found


if __name__ == "__main__":
    run(main)
