"""T-Core, stage 2: finds the encoder's untrusted channels."""

import argparse
import json

import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.files import load_table, save_tensors
from tcore.models.classifier import load_classifier
from tcore.running.cli import run
from tcore.running.record import record
from tcore.stages import filter_channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the suspect classifier")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--subset", required=True, help="the clean subset: round 0 or more")
    parser.add_argument("--settings", type=json.loads, required=True, help='JSON: {"filter_channels": …}')
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--channels", required=True, help="out: masks and untrusted channels by layer")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    settings = filter_channels.Settings(**args.settings["filter_channels"])
    with record(args.record, "filter_channels", args.settings, args.seed, device) as log:
        images = read_images(args.images)
        subset = torch.from_numpy((load_table(args.subset)["round"] >= 0).to_numpy(copy=True)).to(device)
        masks, untrusted, found = filter_channels.filter_channels(
            load_classifier(args.model).to(device),
            images.tensor.to(device),
            images.targets.to(device),
            subset,
            settings,
            args.seed,
        )
        tensors = {f"mask.{name}": mask for name, mask in masks.items()}
        tensors |= {f"untrusted.{name}": flags for name, flags in untrusted.items()}
        save_tensors(args.channels, tensors, **found)
        log |= found


if __name__ == "__main__":
    run(main)
