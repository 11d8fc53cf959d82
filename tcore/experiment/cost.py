"""What a run would cost, before it starts: the jobs of a plan, and what such steps took before.

The plan is Snakemake's; every command in it names its settings and, by the path of its record, its cell. What
a step takes is the mean over records (`*.run.json`) of the same step and method, the nearest first (`BASES`),
in proportion to the training images where the data set is another one and both numbers are known. A step that
has no record is the demo's (`config/config.yaml`) on another machine's CPU: `workflow/seconds.csv`.

Every step pays START, which no record has.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from tcore.experiment import grid
from tcore.files import InputError, load_json

START = 0.8  # seconds: a fork with its imports, and what Snakemake does for a step
BASES = ("measured here", "elsewhere", "other settings", "another method", "unknown")
ROOT = Path(__file__).resolve().parents[2]
STANDARD = ROOT / "workflow" / "seconds.csv"
COLUMNS = ["step", "method", "dataset", "images", "settings", "seconds"]
COMMAND = re.compile(r'python "\$TCORE"/scripts/(\w+)\.py .*--record data/(\S+)')
SETTINGS = re.compile(r"--settings ('[^']*'|\S+)")


def plan(targets: Iterable[str], options: Iterable[str] = ()) -> str:
    """What Snakemake would run: its dry run, with commands."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--dry-run",
        "--printshellcmds",
        "--quiet",
        "reason",
        "host",
    ]
    run = subprocess.run([*command, *options, "--", *targets], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise InputError(f"there is no plan: {run.stderr.strip()}\n{run.stdout.strip()}")
    return run.stdout


def place(record: str) -> dict[str, str]:
    """`method`, `dataset` and `scenario` of a step, from the path of its record below data/."""
    family, *folders = Path(record).parent.parts
    method, dataset, scenario = "", "", "shared"
    if family == "datasets":
        dataset = folders[0]
    elif family == "encoders":
        dataset, method = folders[0].split("-")
    elif family == "poisoned":
        dataset, method = folders[1].split("-")
    elif family in ("defended", "results") and len(folders) > 2:
        (_, encoder_attack), (dataset, dataset_attack) = (name.split("-") for name in folders[:2])
        scenario = grid.scenario(encoder_attack, dataset_attack)
        method = folders[3] if len(folders) > 3 else ""
    return {"method": method, "dataset": dataset, "scenario": scenario}


def planned(text: str) -> pd.DataFrame:
    """One row per job of `plan`: `step`, what `place` says, `settings` (JSON or "")."""
    rows = []
    for command in COMMAND.finditer(text):
        given = SETTINGS.search(command[0])
        settings = given[1].strip("'") if given else ""
        rows.append({"step": command[1], **place(command[2]), "settings": settings})
    return pd.DataFrame(rows, columns=["step", "method", "dataset", "scenario", "settings"])


def sizes(data: Path) -> dict[str, int]:
    """Training images of the data sets that are there."""
    from pyarrow.parquet import read_metadata

    return {path.parent.name: read_metadata(path).num_rows for path in data.glob("datasets/*/train.parquet")}


def measured(data: Path) -> pd.DataFrame:
    """What the steps whose records are below `data` took, the mean of each kind of step: `COLUMNS`."""
    known, rows = sizes(data), []
    for path in data.rglob("*.run.json"):
        found, where = load_json(path), place(str(path.relative_to(data)))
        own = {column: where[column] for column in ("method", "dataset")}
        own |= {"images": known.get(where["dataset"], np.nan), "seconds": found["seconds"]}
        rows.append({"step": found["step"], **own, "settings": json.dumps(found["settings"], sort_keys=True)})
    kinds = pd.DataFrame(rows, columns=COLUMNS).groupby(COLUMNS[:-1], dropna=False)
    return kinds["seconds"].mean().round(2).reset_index()


def known(data: Path) -> pd.DataFrame:
    """`measured`, and STANDARD for steps that have no record."""
    own, standard = measured(data), pd.read_csv(STANDARD, na_values={"images": [""]}, keep_default_na=False)
    standard = standard[~standard["step"].isin(own["step"])].assign(dataset="of the demo")
    return pd.concat([own, standard], ignore_index=True)


def _covers(found: str, wanted: str) -> bool:
    """Whether a record's settings are those of a command; a record may say more, such as the attack."""
    if not wanted:
        return True
    found, wanted = json.loads(found or "{}"), json.loads(wanted)
    return all(found.get(key) == value for key, value in wanted.items())


def estimate(jobs: pd.DataFrame, before: pd.DataFrame, images: dict[str, int]) -> pd.DataFrame:
    """`jobs` (of `planned`) with `seconds`, START included, and `basis`, one of `BASES`; NaN where unknown.

    `before` is as `known` gives it; `images` are training images by data set.
    """
    kinds = jobs[["step", "method", "dataset", "settings"]].drop_duplicates()
    seconds, bases = [], []
    for kind in kinds.itertuples(index=False):
        rows = before[before["step"] == kind.step]
        method = (rows["method"] == kind.method).to_numpy()
        settings = np.array([_covers(found, kind.settings) for found in rows["settings"]], bool)
        here = (rows["dataset"] == kind.dataset).to_numpy()
        choices = (method & settings & here, method & settings, method, ~method)
        level = next((level for level, chosen in enumerate(choices) if chosen.any()), len(choices))
        near = rows[choices[level]] if level < len(choices) else rows
        elsewhere = near["images"].where(near["dataset"] != kind.dataset)
        factor = (images.get(kind.dataset, np.nan) / elsewhere).fillna(1)
        seconds.append(START + (near["seconds"] * factor).mean())
        bases.append(BASES[level])
    return jobs.merge(kinds.assign(seconds=seconds, basis=bases), how="left")


def table(found: pd.DataFrame, by: str) -> list[str]:
    """Jobs, hours (of those known) and what they rest on, a line for each `by` ("step" or "scenario")."""
    lines = [f"{by:<28}{'jobs':>7}{'hours':>10}  rests on"]
    for name, rows in found.groupby(by, sort=False):
        counts = rows["basis"].value_counts()
        rests = ", ".join(f"{b} ({counts[b]:,})" for b in BASES if b in counts)
        hours = "?" if rows["seconds"].isna().all() else f"{rows['seconds'].sum() / 3600:,.2f}"
        lines.append(f"{name:<28}{len(rows):>7,}{hours:>10}  {rests}")
    return lines


def report(found: pd.DataFrame) -> str:
    """The tables by step and scenario, the sum, and how far to trust it."""
    if found.empty:
        return "Nothing to be done."
    hours, rough = found["seconds"].sum() / 3600, found[~found["basis"].isin(BASES[:2])]
    text = [*table(found, "step"), "", *table(found.sort_values("scenario"), "scenario"), ""]
    text.append(
        f"{len(found):,} jobs, {hours:,.2f} hours one after the other; what runs side by side takes less."
    )
    if len(rough):
        guessed, unknown = rough["seconds"].sum() / 3600, int(found["seconds"].isna().sum())
        text.append(
            f"Rough: {guessed:,.2f} of these hours rest on other settings or methods: magnitudes at best. "
            f"{unknown:,} jobs have never been measured and count as nothing."
        )
    return "\n".join(text)
