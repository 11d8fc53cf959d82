"""Turns a foreign checkpoint into an encoder of this project; nothing in the file is executed."""

import argparse

from tcore.cli import run
from tcore.models.encoder import ARCHITECTURES, save_encoder
from tcore.models.foreign import import_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help=".safetensors, or torch's .pt, .pth or .tar")
    parser.add_argument("--architecture", required=True, help=f"one of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--image-size", type=int, required=True, help="height and width in pixels")
    for name in ("mean", "std"):
        help = f"{name} it was trained with, of pixels in [0, 1]"
        parser.add_argument(
            f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), required=True, help=help
        )
    parser.add_argument("--encoder", required=True, help="out: the encoder")
    args = parser.parse_args()

    save_encoder(
        args.encoder,
        import_encoder(args.checkpoint, args.architecture, args.image_size, args.mean, args.std),
    )


if __name__ == "__main__":
    run(main)
