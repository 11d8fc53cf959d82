"""Kills a running workflow at random moments, resumes it, and compares the end with an undisturbed run.

A copy of the sources is run once in peace and once with `kill -9` at moments drawn from the seed, in turns
for Snakemake with all its steps and for Snakemake alone, whose steps then run on beside the next start. A
start after a kill is always `snakemake --unlock` and then the same command. Then one artefact at a time is
damaged, and a dry run asked whether it would compute anything again. Prints counts; exit status 1 if files
of the disturbed run differ from the peaceful one's. Run records are compared without their costs, which no
two runs share, and tables that hold costs are not compared.

    python scripts/inject_faults.py --kills 8 --configfile config/smoke.yaml --scratch /tmp/faults
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COSTS = ("seconds", "peak_ram_mb", "peak_gpu_mb")
WITH_COSTS = ("results.parquet", "table.csv", "report.html")  # hold the seconds of every step
DAMAGES = ("truncated", "one bit flipped", "one bit flipped, time of change kept")


def copy_sources(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--cores", "2", *options]


def workflow(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*options), cwd=folder, capture_output=True, text=True)


def succeed(done: subprocess.CompletedProcess) -> None:
    if done.returncode:
        sys.exit(
            f"error: the workflow failed where nothing was disturbed\n{(done.stdout + done.stderr)[-3000:]}"
        )


def killed(folder: Path, options: list[str], after: float, steps: bool) -> bool:
    """Whether the run was still going on when it was killed, if asked for with the `steps` it had started."""
    run = subprocess.Popen(
        command(*options),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        run.wait(after)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL) if steps else run.kill()
        run.wait()
        return True


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> digest of every file below data/ that two runs should share."""
    found = {}
    for path in sorted((folder / "data").rglob("*")):
        if not path.is_file() or path.name in WITH_COSTS or path.suffix in (".log", ".part"):
            continue
        blob = path.read_bytes()
        if path.name.endswith(".run.json"):
            record = json.loads(blob)
            blob = json.dumps({key: record[key] for key in record if key not in COSTS}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(blob).hexdigest()
    return found


def damage(path: Path, how: str) -> None:
    blob, before = bytearray(path.read_bytes()), path.stat()
    if how == "truncated":
        del blob[len(blob) // 2 :]
    else:
        blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    if how.endswith("kept"):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def up_to_date(folder: Path, options: list[str]) -> bool:
    done = workflow(folder, *options, "--dry-run", "--quiet", "reason")
    return "Nothing to be done" in done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--damages", type=int, default=4, help="artefacts damaged, in each way")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the artefacts")
    parser.add_argument("--configfile", nargs="+", default=["config/smoke.yaml"])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    if args.scratch.exists():
        sys.exit(f"error: --scratch {args.scratch}: is there already; name another folder")
    options, moments = ["--configfile", *args.configfile], random.Random(args.seed)
    peace, war = args.scratch / "peace", args.scratch / "war"
    for folder in (peace, war):
        copy_sources(folder)

    start = time.perf_counter()
    succeed(workflow(peace, *options))
    whole = time.perf_counter() - start
    print(f"undisturbed: {whole:.0f} s")

    counts: Counter[str] = Counter()
    for number in range(args.kills):
        moment, steps = moments.uniform(0, whole / 2), number % 2 == 0
        hit = killed(war, options, moment, steps)
        counts[f"killed {'with steps' if steps else 'alone'}" if hit else "finished before the kill"] += 1
        counts["locked afterwards"] += any((war / ".snakemake/locks").glob("*"))
        print(f"after {moment:.1f} s: {'killed' if hit else 'had finished'}", flush=True)
        succeed(workflow(war, "--unlock"))
        if not hit:
            break
    succeed(workflow(war, *options))
    expected, found = contents(peace), contents(war)
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    counts["unfinished files left"] = len(list((war / "data").rglob(".*.part")))
    counts["files compared"], counts["files that differ"] = len(expected), len(differing)
    print(dict(counts))
    for name in differing:
        print(f"  differs: {name}")

    artefacts = [name for name in expected if name.endswith((".parquet", ".safetensors"))]
    for how in DAMAGES:
        seen: Counter[str] = Counter()
        for name in moments.sample(artefacts, min(args.damages, len(artefacts))):
            path = war / name
            before, times = path.read_bytes(), path.stat()
            damage(path, how)
            seen["not noticed" if up_to_date(war, options) else "noticed"] += 1
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        print(f"{how}: {dict(seen)}", flush=True)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
