"""Injects faults into a workflow and counts what it made of them.

A copy of the sources is run once in peace; other copies suffer, are started again by the same command, and
must end in the same files:

    kills      `kill -9` at moments drawn from the seed, in turns for Snakemake with all its steps and for
               Snakemake alone, whose steps then run on beside the next start
    full disk  the whole folder on a disk that is too small, three times, each time larger
    read-only  the folder of results, then that of poisoned sets, must not be written to
    download   a connection that ends half-way, then a server that is gone
    damages    one artefact cut, or one bit flipped: would a dry run compute anything again?

Full disks and read-only folders are mounts, which `unshare` allows everybody and takes away at the end:

    unshare --map-root-user --mount python scripts/tools/inject_faults.py --scratch ../faults

Prints counts; exit status 1 if files differ or a fault left a run that does not go on. Run records are
compared without their costs, which no two runs share, and tables that hold costs are not compared.
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
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COSTS = ("seconds", "peak_ram_mb", "peak_gpu_mb")
WITH_COSTS = ("results.parquet", "table.csv", "report.html")  # hold the seconds of every step
DAMAGES = ("truncated", "one bit flipped", "one bit flipped, time of change kept")
FAMILIES = ("datasets", "encoders", "poisoned", "defended", "results")  # each made from those before
ROOM = (0.1, 0.4, 0.8)  # of what the run writes, on the disks that are too small


class Copy:
    """The sources in a folder of their own, and the command that runs them."""

    def __init__(self, folder: Path, options: list[str], cores: int):
        self.folder, self.options = folder, options
        self.command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--show-failed-logs"]
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)

    def run(self, *options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*self.command, *options, *self.options],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self) -> None:
        done = self.run()
        if done.returncode:
            sys.exit(f"error: the workflow failed where nothing disturbed it\n{done.stdout[-3000:]}")

    def killed(self, files: int, later: float, steps: bool) -> bool:
        """Whether a run was killed, `later` seconds after there were so many files; or it had ended before.

        With `steps`, what it had started is killed with it.
        """
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        run = subprocess.Popen(
            [*self.command, *self.options], cwd=self.folder, start_new_session=True, **quiet
        )
        while run.poll() is None:
            time.sleep(0.1)
            if sum(path.is_file() for path in (self.folder / "data").rglob("*")) >= files:
                time.sleep(later)
                os.killpg(run.pid, signal.SIGKILL) if steps else run.kill()
                break
        return run.wait() == -signal.SIGKILL

    def up_to_date(self) -> bool:
        return "Nothing to be done" in self.run("--dry-run", "--quiet", "reason").stdout

    def contents(self) -> dict[str, str]:
        """Relative path -> digest of every file below data/ that two runs should share."""
        found = {}
        for path in sorted((self.folder / "data").rglob("*")):
            if not path.is_file() or path.name in WITH_COSTS or path.suffix in (".log", ".part"):
                continue
            blob = path.read_bytes()
            if path.name.endswith(".run.json"):
                record = json.loads(blob)
                blob = json.dumps({key: record[key] for key in record if key not in COSTS}).encode()
            found[str(path.relative_to(self.folder))] = hashlib.sha256(blob).hexdigest()
        return found

    def differing(self, expected: dict[str, str]) -> dict[str, int]:
        """Finishes, and counts the files that are not as `expected`."""
        self.finish()
        found = self.contents()
        names = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        for name in names:
            print(f"  differs: {name}")
        left = len(list((self.folder / "data").rglob(".*.part")))
        return {
            "files compared": len(expected),
            "files that differ": len(names),
            "unfinished files left": left,
        }


def answer(done: subprocess.CompletedProcess, reason: str) -> str:
    """How a run that could not succeed ended; clear is an error that names the reason, and no traceback."""
    if not done.returncode:
        return "not noticed"
    if "Traceback" in done.stdout:
        return "with a traceback"
    return "with a clear error" if reason in done.stdout else "without its reason"


def kills(copy: Copy, number: int, files: int, moments: random.Random) -> Counter[str]:
    """Kills so many runs, each further on than the one before; the undisturbed run left so many `files`."""
    counts: Counter[str] = Counter()
    for turn, share in enumerate(sorted(moments.random() for _ in range(number))):
        steps = turn % 2 == 0
        hit = copy.killed(int(share * files), moments.uniform(0, 3), steps)
        counts[f"killed {'with steps' if steps else 'alone'}" if hit else "finished before the kill"] += 1
        counts["locked afterwards"] += any((copy.folder / ".snakemake/locks").glob("*"))
    return counts


def full_disk(copy: Copy, size: int) -> Counter[str]:
    """The copy lies on a disk of its own; `size` is what it holds at the end, in bytes."""
    counts: Counter[str] = Counter()
    used = sum(path.lstat().st_size for path in copy.folder.rglob("*"))
    for room in ROOM:
        resize(copy.folder, used + int(room * size))
        counts[answer(copy.run(), "No space left on device")] += 1
    resize(copy.folder, 4 * (used + size))
    return counts


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def read_only(copy: Copy, name: str) -> str:
    """Forgets what the folder held and what came of it, and asks for it where it cannot be written."""
    for later in FAMILIES[FAMILIES.index(name) :]:
        shutil.rmtree(copy.folder / "data" / later)
    folder = copy.folder / "data" / name
    folder.mkdir()
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        return answer(copy.run(), "Read-only file system")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


BLOB = bytes(range(256)) * 4096
SOURCE = """
from tcore.data.archives import Archive

ARCHIVES = (Archive("blob.bin", "{url}", "sha256:{digest}"),)
"""


class Server(BaseHTTPRequestHandler):
    """Sends half of the file, then, asked again, all of it."""

    asked = 0

    def do_GET(self):
        Server.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(BLOB)))
        self.end_headers()
        self.wfile.write(BLOB[: len(BLOB) // 2] if Server.asked == 1 else BLOB)

    def log_message(self, *args):
        pass


def lost_download(copy: Copy) -> Counter[str]:
    counts: Counter[str] = Counter()
    archive = "data/archives/lossy/blob.bin"
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        (copy.folder / "tcore/data/sources/lossy.py").write_text(
            SOURCE.format(url=url, digest=hashlib.sha256(BLOB).hexdigest())
        )
        counts[answer(copy.run(archive), "the connection ended after")] += 1
        counts["half a file left"] += (copy.folder / archive).exists()
        counts["whole at the second start"] += not copy.run(archive).returncode
        server.shutdown()
    counts["right content"] += (copy.folder / archive).read_bytes() == BLOB
    (copy.folder / archive).unlink()
    counts[answer(copy.run(archive), "Connection refused")] += 1  # nobody listens any more
    (copy.folder / "tcore/data/sources/lossy.py").unlink()
    return counts


def damage(path: Path, how: str) -> None:
    blob, before = bytearray(path.read_bytes()), path.stat()
    if how == "truncated":
        del blob[len(blob) // 2 :]
    else:
        blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    if how.endswith("kept"):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def damages(copy: Copy, how: str, artefacts: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in artefacts:
        path = copy.folder / name
        before, times = path.read_bytes(), path.stat()
        damage(path, how)
        counts["not noticed" if copy.up_to_date() else "noticed"] += 1
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--damages", type=int, default=4, help="artefacts damaged, in each way")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the artefacts")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--configfile", nargs="+", default=["config/smoke.yaml"])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    if args.scratch.exists():
        sys.exit(f"error: --scratch {args.scratch}: is there already; name another folder")
    options, drawn = ["--configfile", *args.configfile], random.Random(args.seed)
    differing = 0

    def report(fault: str, counts: dict[str, int]) -> None:
        nonlocal differing
        differing += counts.get("files that differ", 0)
        print(f"{fault}: {dict(counts)}", flush=True)

    peace = Copy(args.scratch / "peace", options, args.cores)
    start = time.perf_counter()
    peace.finish()
    expected = peace.contents()
    print(f"undisturbed: {time.perf_counter() - start:.0f} s, {len(expected)} files", flush=True)

    killed = Copy(args.scratch / "killed", options, args.cores)
    counts = kills(killed, args.kills, len(expected), drawn)
    report("kills", counts | killed.differing(expected))

    small = args.scratch / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tcore", str(small)]).returncode:
        print("full disk, read-only: not tried; run under `unshare --map-root-user --mount`")
    else:
        try:
            disk = Copy(small, options, args.cores)
            size = sum(path.stat().st_size for path in (peace.folder / "data").rglob("*") if path.is_file())
            report("full disk", full_disk(disk, size) | disk.differing(expected))
            for name in ("results", "poisoned"):
                report(f"read-only {name}", {read_only(disk, name): 1} | disk.differing(expected))
        finally:
            subprocess.run(["umount", str(small)], check=True)

    report("download", lost_download(peace))
    artefacts = [name for name in expected if name.endswith((".parquet", ".safetensors"))]
    for how in DAMAGES:
        chosen = drawn.sample(artefacts, min(args.damages, len(artefacts)))
        report(how, damages(peace, how, chosen))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
