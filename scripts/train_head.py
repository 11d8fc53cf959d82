"""Trains a head on all that was received, without a defence."""

import argparse
import json

from tcore import device as devices
from tcore.data.images import read_images
from tcore.files import load_tensors
from tcore.models import head as heads
from tcore.models.classifier import Classifier, save_classifier
from tcore.models.encoder import load_encoder
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--features", required=True, help="its features of the images")
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--settings", type=json.loads, required=True, help='JSON: {"head": settings}')
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model", required=True, help="out: the classifier")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    settings = heads.Settings(**args.settings["head"])
    with record(args.record, "train_head", args.settings, args.seed, device):
        images = read_images(args.images)
        features = load_tensors(args.features)[0]["features"].to(device)
        head = heads.new_head(features.shape[1], images.num_classes, settings, args.seed, "head")
        heads.fit_head(head, features, images.targets.to(device), settings.epochs, args.seed, "head")
        save_classifier(args.model, Classifier(load_encoder(args.encoder), head.cpu()), images.class_names)


if __name__ == "__main__":
    run(main)
