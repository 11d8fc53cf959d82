"""Runs a plan's steps where there is no Snakemake: on a borrowed GPU machine, say.

here:   snakemake -n -p --configfile config/photographs.yaml > plan.txt
there:  PYTHONPATH=. python scripts/tools/run_steps.py plan.txt --jobs 4
back:   bring data/ here with its times of change (to look at: data/results), and run snakemake as ever

There is a copy of this folder and of the files that the plan starts from, with the library's packages
installed. The first step of the plan that names a file below data/ makes it, later ones that name it wait; a
step that is given the whole folder waits for all before it. A step whose files are there is done, so the same
command goes on where a run stopped. Of the steps that could start the first in the plan does. On a CPU every
step has OMP_NUM_THREADS threads, where Snakemake gives each its own number.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tcore.files import InputError
from tcore.running import starter
from tcore.running.cli import run

COMMAND = re.compile(r"^Shell command: (.+)$", re.MULTILINE)
FILE = re.compile(r"\bdata/(?!logs/)[\w.+/-]*\w")
LOG = re.compile(r"\bdata/logs/\S+")
WHOLE = "--data data "


@dataclass(frozen=True)
class Step:
    """A command, the files that it makes and the numbers of the steps that it waits for."""

    command: str
    makes: tuple[Path, ...]
    after: frozenset[int]

    def done(self) -> bool:
        return all(file.exists() for file in self.makes)


def read_plan(text: str) -> list[Step]:
    """The steps that a dry run printed, in its order."""
    steps, makers = [], {}
    for number, command in enumerate(COMMAND.findall(text)):
        after = {makers.setdefault(file, number) for file in FILE.findall(command)} - {number}
        makes = tuple(Path(file) for file, maker in makers.items() if maker == number)
        steps.append(Step(command, makes, frozenset(range(number) if WHOLE in command else after)))
    return steps


def begin(step: Step) -> subprocess.Popen:
    """Starts a step, which finds `python`, the library and the server of its start-up."""
    for file in (*step.makes, *map(Path, LOG.findall(step.command))):
        file.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(["bash", "-c", starter.prefix() + step.command], start_new_session=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="what `snakemake -n -p` printed")
    parser.add_argument("--jobs", type=int, default=1, help="steps at the same time")
    args = parser.parse_args()

    if not args.plan.is_file():
        raise InputError(f"{args.plan} is not there; make it with: snakemake -n -p > {args.plan}")
    steps = read_plan(args.plan.read_text())
    if not steps:
        raise InputError(f"{args.plan}: no steps; it should be what snakemake -n -p printed")
    server = starter.start()
    done = {number for number, step in enumerate(steps) if step.done()}
    waiting, running, failed = [n for n in range(len(steps)) if n not in done], {}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tqdm(total=len(steps), initial=len(done), desc="steps", unit="step") as bar:
            while running or any(steps[n].after <= done for n in waiting):
                ready = [n for n in waiting if steps[n].after <= done]
                for number in ready[: args.jobs - len(running)]:
                    waiting.remove(number)
                    running[number] = begin(steps[number])
                time.sleep(0.05)
                for number in [n for n, process in running.items() if process.poll() is not None]:
                    if running.pop(number).returncode:
                        failed.append(number)
                        tqdm.write(f"failed: {steps[number].command}", file=sys.stderr)
                    else:
                        done.add(number)
                        bar.update()
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        if server:
            server.stdin.close()
    if failed:
        raise InputError(
            f"steps that failed: {len(failed)}, that wait for those: {len(waiting)}; "
            "see data/logs, then run the same command again"
        )


if __name__ == "__main__":
    run(main)
