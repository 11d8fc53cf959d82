"""Computes the encoder's features of a data set once, for all that leave the encoder frozen."""

import argparse

from tcore import device as devices
from tcore.data.images import read_images
from tcore.files import InputError, save_tensors
from tcore.models.encoder import extract_features, load_encoder
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--images", required=True, help="the data set received (Parquet)")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--features", required=True, help="out: features (n, d)")
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    device = devices.pick()
    with record(args.record, "extract_features", {}, args.seed, device):
        encoder = load_encoder(args.encoder).to(device)
        features = extract_features(encoder, read_images(args.images).tensor)
        if bad := int((~features.isfinite()).any(1).sum()):
            raise InputError(
                f"{args.encoder}: gives {bad} of {len(features)} images features that are no numbers; "
                "check its mean, std and weights"
            )
        save_tensors(args.features, {"features": features})


if __name__ == "__main__":
    run(main)
