"""A poisoned set of backdoor-toolbox in this project's files. It does not contain the trigger."""

import argparse

from tcore.data.images import write_images
from tcore.files import load_json, save_table
from tcore.poisoning import toolbox
from tcore.running.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="with imgs, labels and poison_indices")
    parser.add_argument("--class-names", help="JSON list of the classes' names; without it, numbers")
    parser.add_argument("--train", required=True, help="out: images and labels as the user receives them")
    parser.add_argument("--truth", required=True, help="out: which rows are poisoned")
    args = parser.parse_args()

    names = tuple(load_json(args.class_names)) if args.class_names else None
    images, truth = toolbox.read(args.folder, names)
    write_images(args.train, images)
    save_table(args.truth, truth)


if __name__ == "__main__":
    run(main)
