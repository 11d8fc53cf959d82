"""T-Core, stage 1a: sifts the first trusted samples of each class."""

import argparse
import json

from tcore import device as devices
from tcore.data.images import read_images
from tcore.files import load_tensors, save_table
from tcore.models.classifier import load_classifier
from tcore.running.cli import run
from tcore.running.record import record
from tcore.stages import sift


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the suspect classifier")
    parser.add_argument("--features", required=True, help="the encoder's features of the images")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--settings", type=json.loads, required=True, help='JSON: {"sift": settings}')
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seeds", required=True, help="out: table of samples, `trusted` marks seed samples")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    settings = sift.Settings(**args.settings["sift"])
    with record(args.record, "sift", args.settings, args.seed, device):
        images = read_images(args.images)
        labels = images.targets.to(device)
        features = load_tensors(args.features)[0]["features"].to(device)
        layers = sift.activations(load_classifier(args.model).to(device), features, images.tensor, settings)
        save_table(args.seeds, sift.sift(layers, labels, settings, args.seed).assign(index=images.index))


if __name__ == "__main__":
    run(main)
