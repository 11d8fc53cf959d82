"""How long the steps of a finished run take, in this checkout and in another: seconds, memory, their ratio.

    python benchmarks/steps.py --folder ~/demo --against ~/tcore-before

`--folder` holds the data/ of a finished run, made with the configuration files given. The steps' commands are
those of Snakemake; they run on a copy of the folder (hard links) from the files that stand there, first with
one checkout and then with the other, `--runs` times in turn. Seconds are those of the step's record, without
start-up, or of the whole process where it writes none; of several runs the fastest, because a busy machine
only ever adds. Steps have one thread.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tcore.running.cli import run

HERE = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"^Shell command: (.+)$", re.MULTILINE)
SCRIPT = re.compile(r'"\$TCORE"/scripts/(\w+)\.py')
RECORD = re.compile(r"--record (\S+)")
DEAR = ("pretrain_encoder", "poison_encoder", "train_head", "sift", "expand", "filter_channels", "bootstrap")


def commands(folder: Path, configuration: list[str]) -> dict[str, list[str]]:
    """The commands of a whole run in `folder`, by script."""
    dry_run = [sys.executable, "-m", "snakemake", "-n", "-p", "--forceall", "--nolock"]
    where = ["--snakefile", str(HERE / "Snakefile"), "--directory", str(folder)]
    files = ["--configfile", *configuration] if configuration else []
    plan = subprocess.run([*dry_run, *where, *files], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = {}
    for command in COMMAND.findall(plan.stdout + plan.stderr):
        if script := SCRIPT.search(command):
            found.setdefault(script[1], []).append(command)
    return found


def measure(command: str, checkout: Path, folder: Path) -> tuple[float, float]:
    """Seconds and MB of one step."""
    environment = os.environ | {"TCORE": str(checkout), "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    start = time.perf_counter()
    subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True)
    whole = time.perf_counter() - start
    if record := RECORD.search(command):
        told = json.loads((folder / record[1]).read_text())
        return told["seconds"], told["peak_ram_mb"]
    return whole, float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=HERE, help="of a finished run")
    parser.add_argument("--configfile", nargs="+", default=[], help="as for Snakemake")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--steps", nargs="+", default=DEAR, help="names of scripts")
    parser.add_argument("--of-each", type=int, default=1, help="commands of each script, the first ones")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    checkouts = [HERE, *([args.against.resolve()] if args.against else [])]
    against = bool(args.against)
    plan = commands(args.folder.resolve(), args.configfile)
    with tempfile.TemporaryDirectory(dir=args.folder) as copy:
        shutil.copytree(args.folder / "data", Path(copy) / "data", copy_function=os.link)
        print("| step | seconds | MB |" + " seconds before | MB before | before / after |" * against)
        print("| --- | ---: | ---: |" + " ---: | ---: | ---: |" * against)
        for step in args.steps:
            for command in plan.get(step, [])[: args.of_each]:
                runs = [[measure(command, here, Path(copy)) for here in checkouts] for _ in range(args.runs)]
                best = [min(values) for values in zip(*runs, strict=True)]
                cells = [f"{seconds:.1f} | {memory:.0f}" for seconds, memory in best]
                ratio = [f"{best[1][0] / best[0][0]:.2f}"] if against else []
                print(f"| {step} | {' | '.join(cells + ratio)} |", flush=True)


if __name__ == "__main__":
    run(main)
