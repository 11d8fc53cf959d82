"""The record of a step: what ran, on what, for how long."""

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tcore.files import save_json

# What numbers come from; Snakemake, for one, computes none.
PACKAGES = (
    "tcore",
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "pyarrow",
    "pillow",
)


CONFIG = "TCORE_CONFIG"  # environment variable: the configuration files, as the workflow sets it


def commit() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None where there is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def record(path: str | Path, step: str, settings: dict, seed: int, device=None) -> Iterator[dict]:
    """Writes `path` (JSON) when the block ends well: settings, seed, commit, versions, device, cost.

    Yields a dict; what the block puts in it is written under `log`. `peak_ram_mb` is the
    peak resident memory of the process, `peak_gpu_mb` what torch had allocated at most.
    """
    on_gpu = device is not None and device.type == "cuda"
    log: dict = {}
    start = time.perf_counter()
    yield log
    seconds = time.perf_counter() - start
    if device is not None:
        from tcore.device import arithmetic
    if on_gpu:
        import torch

        gpu, gpu_mb = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device) / 2**20
    save_json(
        path,
        {
            "step": step,
            "settings": settings,
            "seed": seed,
            "config": os.environ.get(CONFIG),
            "commit": commit(),
            "versions": {package: _version(package) for package in PACKAGES},
            "device": gpu if on_gpu else "cpu",
            "arithmetic": None if device is None else arithmetic(device),
            "seconds": round(seconds, 3),
            "peak_ram_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "peak_gpu_mb": round(gpu_mb, 1) if on_gpu else None,
            "log": log,
        },
    )
