"""Pre-trains an encoder on unlabelled images."""

import argparse
import json

import torch

from tcore import device as devices
from tcore.data.images import read_images
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.models.encoder import save_encoder
from tcore.models.knn import knn_accuracy
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="unlabelled images (Parquet)")
    parser.add_argument("--settings", type=json.loads, required=True, help="JSON: {method: its settings}")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--encoder", required=True, help="out: the encoder")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    ((name, given),) = args.settings.items()
    method = registry.load("pretraining", name)
    settings = method.Settings(**resolve(name, given))
    device = devices.pick()
    with record(args.record, "pretrain_encoder", args.settings, args.seed, device) as log:
        images = read_images(args.images)
        aspects = None if images.aspects is None else torch.from_numpy(images.aspects)
        encoder, training = method.pretrain(images.tensor, settings, args.seed, device, aspects)
        save_encoder(args.encoder, encoder)
        log |= {"knn_accuracy": knn_accuracy(encoder, images), **training}


if __name__ == "__main__":
    run(main)
