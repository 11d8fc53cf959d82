"""Plans of Snakemake, each made by a fork of one process that has it loaded: half the time or less.

A fork has nothing of this project: the Snakefile says where to load that from.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOADED = ("pytest", "snakemake.cli", "snakemake.persistence.file", "snakemake.report", "jinja2", "pandas")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*LOADED])


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What `snakemake <arguments>` in `folder` prints; for plans, as runs want a process of their own."""
    with tempfile.TemporaryDirectory() as place:
        streams = [Path(place, name) for name in ("stdout", "stderr")]
        fork = FORKS.Process(target=_run, args=(folder, [*map(str, arguments)], dict(os.environ), streams))
        fork.start()
        fork.join()
        texts = (stream.read_text() for stream in streams)
        return subprocess.CompletedProcess(arguments, fork.exitcode, *texts)


def _run(folder: Path, arguments: list[str], environment: dict[str, str], streams: list[Path]) -> None:
    from snakemake import cli

    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["snakemake", *arguments]
    cli.main(arguments)
