"""How long Snakemake plans, and how much memory that takes.

The first plan is config/paper.yaml with one pair of data sets and as many random seeds as give about so
many jobs, where nothing is there yet. The second, with --noop, is a folder with a finished data/, where
nothing is to be done. CPU seconds are of the dry run, with its printing, which a run does not have. Memory
is the peak of the process. Times beside other work are too long: compare two states of the code in
alternation.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tcore.files import InputError
from tcore.running.cli import run

ROOT = Path(__file__).resolve().parents[1]
PAIR = {"pretrain": "cifar10", "downstream": "stl10", "encoder_attacks": ["badencoder", "drupe"]}


def measure(folder: str | Path, *arguments: str) -> dict:
    """Jobs that a dry run in `folder` plans, its CPU and wall seconds and its peak MiB."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [*command, "--dry-run", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read()
    if status:
        raise InputError(f"snakemake failed: {text[-1000:]}")
    found = re.search(r"^total +(\d+)$", text, re.MULTILINE)
    jobs = int(found[1]) if found else 0
    cpu = usage.ru_utime + usage.ru_stime
    return {"jobs": jobs, "cpu": cpu, "seconds": seconds, "memory": usage.ru_maxrss / 1024}


def grid(seeds: int) -> dict:
    """A dry run of config/paper.yaml with one pair and so many random seeds, where nothing is there yet."""
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder, "shorter.yaml")
        overlay.write_text(yaml.safe_dump({"pairs": [PAIR], "seeds": list(range(seeds))}))
        return measure(folder, "--configfile", str(ROOT / "config" / "paper.yaml"), str(overlay))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000, help="about so many; 0: skip")
    parser.add_argument("--noop", metavar="FOLDER", help="with a finished data/")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()

    print("| plan | jobs | CPU s | wall s | memory, MiB |")
    print("|---|---|---|---|---|")
    cases = {}
    if args.jobs:
        one = grid(1)["jobs"]
        cases["paper.yaml"] = lambda: grid(max(1, round(args.jobs / one)))
    if args.noop:
        cases["nothing to do"] = lambda: measure(Path(args.noop).resolve())
    for _ in range(args.repeats):
        for name, case in cases.items():
            found = case()
            print(
                f"| {name} | {found['jobs']:,} | {found['cpu']:.1f} | {found['seconds']:.1f} | "
                f"{found['memory']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
