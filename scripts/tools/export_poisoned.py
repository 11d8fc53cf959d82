"""A poisoned set in the files of backdoor-toolbox."""

import argparse

from tcore.data.images import read_images
from tcore.files import InputError, load_table
from tcore.poisoning import toolbox
from tcore.running.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="the set as the user receives it (Parquet)")
    parser.add_argument("--truth", required=True, help="which rows are poisoned")
    parser.add_argument("--folder", required=True, help="out: imgs, labels, poison_indices, cover_indices")
    args = parser.parse_args()

    images, truth = read_images(args.train), load_table(args.truth)
    if truth["index"].tolist() != images.index.tolist():
        raise InputError(f"{args.truth}: its rows are not those of {args.train}; give the two of one folder")
    toolbox.write(args.folder, images, truth)


if __name__ == "__main__":
    run(main)
