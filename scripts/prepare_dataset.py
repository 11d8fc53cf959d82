"""Reads a data set from its source and writes its splits in the project's image format."""

import argparse
import json
from pathlib import Path

from tcore.data.archives import verify
from tcore.data.images import write_images
from tcore.experiment import registry
from tcore.experiment.settings import resolve
from tcore.files import InputError
from tcore.running.cli import run
from tcore.running.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="a file name of tcore/data/sources")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON object; defaults fill the rest")
    parser.add_argument(
        "--archives", nargs="*", type=Path, default=[], help="the source's archives, names as published"
    )
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--record", required=True, help="out: the record of this step")
    args = parser.parse_args()

    source = registry.load("data/sources", args.source)
    settings = resolve(args.source, args.settings)
    archives = {path.name: path for path in args.archives}
    for archive in getattr(source, "ARCHIVES", ()):
        if archive.name not in archives:
            raise InputError(f"--archives lacks {archive.name}; download it from {archive.url}")
        verify(archives[archive.name], archive.checksum)
    with record(args.record, "prepare_dataset", settings, settings.get("seed", 0)) as log:
        splits = source.load(source.Settings(**settings) if settings else None, archives)
        for name, path in {"train": args.train, "test": args.test}.items():
            write_images(path, splits[name])
            log[name] = {"images": len(splits[name]), "origin": splits[name].origin}


if __name__ == "__main__":
    run(main)
