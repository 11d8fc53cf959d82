"""Turns a foreign checkpoint into an encoder of this project; nothing in the file is executed."""

import argparse
import hashlib
from contextlib import nullcontext

from tcore.models.encoder import ARCHITECTURES, save_encoder
from tcore.received.checkpoint import import_encoder
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help=".safetensors, or torch's .pt, .pth or .tar")
    parser.add_argument(
        "--architecture",
        required=True,
        help=f"{', '.join(ARCHITECTURES)}, torchvision:<name>, timm:<name> or <your module>:<name>",
    )
    parser.add_argument("--image-size", type=int, required=True, help="height and width in pixels")
    for name in ("mean", "std"):
        help = f"{name} it was trained with, of pixels in [0, 1]"
        parser.add_argument(
            f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), required=True, help=help
        )
    parser.add_argument("--encoder", required=True, help="out: the encoder")
    parser.add_argument("--record", help="out: the record of this step, with the checkpoint's SHA-256")
    args = parser.parse_args()

    with record(args.record, "import_encoder", {}, None) if args.record else nullcontext({}) as log:
        encoder = import_encoder(args.checkpoint, args.architecture, args.image_size, args.mean, args.std)
        save_encoder(args.encoder, encoder)
        with open(args.checkpoint, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        log |= {"checkpoint": args.checkpoint, "sha256": digest} | encoder.description()


if __name__ == "__main__":
    run(main)
