"""`tcore secure`: your encoder and your images in, a clean model and an audit out.
`tcore predict`: what a model says about the images in a folder.

`python -m tcore` is the same.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tcore.experiment import registry
from tcore.experiment.config import require_files, validate
from tcore.files import InputError, atomic
from tcore.running.cli import run

ROOT = Path(__file__).resolve().parents[1]
DEMO, OWN = (ROOT / "config" / name for name in ("config.yaml", "own.yaml"))
BLOCK = 512  # images decoded at a time
KNOWN = {"efficientnet_lite0": {"image_size": 224, "mean": [127 / 255] * 3, "std": [128 / 255] * 3}}


def pixels(args: argparse.Namespace) -> dict:
    """What the encoder was trained on: the flags, or else what is known of the library's own weights."""
    given = {name: getattr(args, name) for name in ("image_size", "mean", "std")}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return given
    found = KNOWN.get(args.architecture, {})
    if args.architecture.startswith(("torchvision:", "timm:")):
        from tcore.models import elsewhere

        found = elsewhere.known(args.architecture)
    given |= {name: found.get(name) for name in missing}
    if unknown := [f"--{name.replace('_', '-')}" for name in missing if given[name] is None]:
        raise InputError(f"{' '.join(unknown)}: not known for {args.architecture}; whoever trained it knows")
    print(
        f"As for the weights that come with {args.architecture}:",
        ", ".join(f"{name} {given[name]}" for name in missing),
    )
    return given


def own_config(args: argparse.Namespace) -> dict:
    """config/own.yaml with the flags filled in; paths are absolute, so that it can be used from anywhere."""
    config = yaml.safe_load(OWN.read_text())
    images = args.images.resolve()
    if not images.exists():
        raise InputError(f"--images {args.images}: no such folder or table")
    if not args.encoder.is_file():
        raise InputError(f"--encoder {args.encoder}: no such file")
    config["seeds"] = [args.seed]
    encoder = f"{args.name}_encoder"
    config["pairs"] = [{"pretrain": encoder, "downstream": args.name}]
    entry = {"file": str(args.encoder.resolve()), "architecture": args.architecture} | pixels(args)
    config["encoders"] = {encoder: entry | ({"run_code": True} if args.run_code else {})}
    settings = {"path": str(images), "image_size": entry["image_size"], "test_share": args.test_share}
    if images.is_file():
        columns = ("image_column", "label_column", "split_column")
        settings |= {name: getattr(args, name) for name in columns}
    source = "imagefolder" if images.is_dir() else "parquet"
    config["datasets"] = {args.name: {"source": source, "settings": settings}}
    if args.seed_share is not None:
        config["methods"]["sift"]["seed_share"] = args.seed_share
    if args.untrusted_share is not None:
        config["methods"]["filter_channels"]["untrusted_share"] = args.untrusted_share
    return config


def secure(args: argparse.Namespace) -> None:
    from snakemake.utils import update_config

    if not (ROOT / "Snakefile").is_file():
        raise InputError(f"{ROOT}: no Snakefile; in a clone of the repository: pip install --editable .")
    config = own_config(args)
    whole = yaml.safe_load(DEMO.read_text())
    update_config(whole, copy.deepcopy(config))
    require_files(validate(whole))
    data = args.directory.resolve() / "data"
    path = data / "own" / f"{args.name}.yaml"
    with atomic(path) as temporary:
        temporary.write_text(f"# Written by `tcore secure`.\n{yaml.safe_dump(config)}")
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--quiet", "reason", "host"]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(data.parent)]
    command += ["--configfile", str(path)]
    if args.dry_run:
        workflow([*command, "--dry-run"], data)
    else:
        cell = f"{args.name}_encoder-received/{args.name}-received/{args.seed}"
        results, defended = (data / family / cell for family in ("results", "defended"))
        workflow([*command, "--until", "check_received"], data)
        say_what_it_takes(json.loads((defended / "check_received.run.json").read_text())["log"])
        workflow(command, data)
        print(f"The audit            {results / 'audit.html'}")
        print(f"Images by distrust   {results / 'distrust.csv'}")
        print(f"The clean model      {defended / 'tcore' / 'model.safetensors'}")
        print(f"... as TorchScript   {results / 'model.pt'}")
        print(f"Without T-Core       {defended / 'none' / 'model.safetensors'}")


def workflow(command: list[str], data: Path) -> None:
    """Runs Snakemake; where a step stopped with a message of ours, that is the last thing said."""
    start = time.time()
    try:
        if not subprocess.run(command).returncode:
            return
    except KeyboardInterrupt:
        raise InputError("interrupted; the same command goes on where it stopped") from None
    logs = [path for path in (data / "logs").rglob("*.log") if path.stat().st_mtime >= start]
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        if found := [line for line in path.read_text().splitlines() if line.startswith("error: ")]:
            raise InputError(f"{found[-1].removeprefix('error: ')} ({path.relative_to(data.parent)})")
    raise InputError("it stopped, the reason stands above; mend it and run the same command again")


def say_what_it_takes(checked: dict) -> None:
    """The estimate, before the long part."""
    print(
        f"{checked['images']:,} training images of {checked['classes']:,} classes, {checked['smallest']:,} "
        f"to {checked['largest']:,} each, {checked['duplicates']:,} of them repeated. T-Core will take up to "
        f"{max(1, round(checked['seconds'] / 60)):,} minutes and {checked['memory_mb']:,} MiB here.",
        flush=True,
    )


def predict(args: argparse.Namespace) -> None:
    import pandas as pd
    import torch
    from tqdm import tqdm

    from tcore import device as devices
    from tcore.data.sources._reading import decode, square, stack
    from tcore.data.sources.imagefolder import SUFFIXES
    from tcore.files import load_tensors
    from tcore.models.classifier import load_classifier, logits

    if not args.images.is_dir():
        raise InputError(f"--images {args.images}: no such folder")
    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"--images {args.images}: no images in it ({', '.join(sorted(SUFFIXES))})")
    meta = load_tensors(args.model)[1]
    if args.run_code:
        os.environ["TCORE_RUN_CODE"] = meta.get("encoder", {}).get("architecture", "")
    model = load_classifier(args.model).to(devices.pick())
    names = meta["class_names"]
    size = model.encoder.image_size
    tables = []
    for start in tqdm(range(0, len(paths), BLOCK), desc="predict", unit="block"):
        part, images, problems = paths[start : start + BLOCK], [], []
        for path in part:
            try:
                images.append(square(decode(path, str(path)), size))
                problems.append("")
            except InputError as error:
                problems.append(str(error))
        table = pd.DataFrame({"image": list(map(str, part)), "class": None, "confidence": None})
        if images:
            pixels = torch.from_numpy(stack(images, len(images), str(args.images))).permute(0, 3, 1, 2)
            confidence, best = logits(model, pixels).softmax(1).cpu().max(1)
            good = [not problem for problem in problems]
            table.loc[good, "class"] = [names[i] for i in best.tolist()]
            table.loc[good, "confidence"] = confidence.numpy().round(4)
        tables.append(table.assign(problem=problems))
    found = pd.concat(tables, ignore_index=True)
    with atomic(args.output) as temporary:
        found.to_csv(temporary, index=False)
    print(f"{len(found):,} images, {int((found['problem'] != '').sum())} unreadable: {args.output}")
    print(found["class"].value_counts().to_string(header=False))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tcore", description=__doc__)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("secure", help="a clean model and an audit")
    one.set_defaults(run=secure)
    one.add_argument("--encoder", type=Path, required=True, help="a state_dict: .pt, .pth or .safetensors")
    one.add_argument(
        "--architecture",
        required=True,
        help=", ".join(registry.architectures())
        + ", torchvision:<name>, timm:<name> or <your module>:<name>",
    )
    one.add_argument("--images", type=Path, required=True, help="folder per class, or a .csv or Parquet file")
    one.add_argument("--image-size", type=int, help="what the encoder takes, in pixels")
    for name in ("mean", "std"):
        meaning = f"{name} it was trained with, of pixels in [0, 1]"
        one.add_argument(f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), help=meaning)
    one.add_argument("--run-code", action="store_true", help="I trust <your module>; its code may run")
    one.add_argument("--test-share", type=float, default=0.2, help="held out where no split is given")
    one.add_argument("--image-column", default="image", help="of a table: images or paths")
    one.add_argument("--label-column", default="label", help="of a table")
    one.add_argument("--split-column", help="of a table, if it has one: train, test or val")
    one.add_argument("--seed-share", type=float, help="of each class trusted first; default as in own.yaml")
    one.add_argument(
        "--untrusted-share", type=float, help="of each layer's channels; narrow networks need more than 0.1"
    )
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--name", default="mine", help="of a-z, 0-9 and _: what it is called below data/")
    one.add_argument("--directory", type=Path, default=ROOT, help="where its data/ is; default: the clone")
    one.add_argument("--dry-run", action="store_true", help="say what would be done")
    two = commands.add_parser("predict", help="what a model says about the images in a folder")
    two.set_defaults(run=predict)
    two.add_argument("--model", type=Path, required=True, help="model.safetensors")
    two.add_argument("--images", type=Path, required=True, help="folder; subfolders are read too")
    two.add_argument("--output", type=Path, required=True, help="out: CSV")
    two.add_argument("--run-code", action="store_true", help="I trust <your module>, as in secure")
    return top


def main() -> None:
    args = parser().parse_args()
    args.run(args)


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
