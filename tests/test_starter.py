"""A step that is started by the server, against the same step started by Python itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tcore.running import starter

TELL = """
import json, os, sys
import told
print(json.dumps([sys.argv, __name__, sys.path[:2], os.getcwd(), os.environ.get("TOLD"), sys.stdin.read(),
                  told.__file__]), flush=True)
print("warning", file=sys.stderr)
"""
ENDS = {
    "well": ("import torch; print(torch.get_num_threads())", 0),
    "code": ("sys.exit(3)", 3),
    "text": ("sys.exit('error: no')", 1),
    "error": ("raise ValueError('no')", 1),
    "killed": ("os.kill(os.getpid(), 9)", 128 + 9),
}


@pytest.fixture(scope="module")
def server():
    before = dict(os.environ)
    yield starter.start()
    os.environ.clear()
    os.environ.update(before)


def step(folder: Path, *more: str) -> list[str]:
    (folder / "steps").mkdir(exist_ok=True)
    (folder / "steps/told.py").touch()
    (folder / "steps/tell.py").write_text("\n".join([TELL, *more]))
    return ["steps/tell.py", "an argument", "--flag"]


def run(command: list[str], folder: Path, **environment: str):
    return subprocess.run(
        command,
        cwd=folder,
        input="given",
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("end", ENDS)
def test_a_step_is_what_python_would_make_of_it(server, tmp_path, end):
    code, expected = ENDS[end]
    own = {"TOLD": "yes", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "PYTHONPATH": "/somewhere"}
    arguments = step(tmp_path, code)
    plain = run([sys.executable, *arguments], tmp_path, **own)
    forked = run([sys.executable, "-I", "-S", starter.__file__, *arguments], tmp_path, **own)
    assert forked.stdout == plain.stdout != ""
    assert forked.stderr.splitlines()[0] == plain.stderr.splitlines()[0] == "warning"
    assert forked.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]
    assert forked.returncode == expected and plain.returncode in (expected, 128 - expected)


def test_it_is_the_server_that_runs_it_and_it_need_not_load_torch(server, tmp_path):
    arguments = step(
        tmp_path, "print(os.path.exists('/proc/self/cmdline') and open('/proc/self/cmdline').read())"
    )
    command = [sys.executable, "-I", "-S", starter.__file__, *arguments]
    assert "--serve" in run(command, tmp_path).stdout
    assert "--serve" not in run(command, tmp_path, **{starter.ADDRESS: "nobody-there"}).stdout


def test_a_step_ends_with_its_client(server, tmp_path):
    arguments = step(tmp_path, "print(os.getpid(), flush=True); import time; time.sleep(60)")
    client = subprocess.Popen(
        [sys.executable, "-I", "-S", starter.__file__, *arguments],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    client.stdout.readline()
    pid = int(client.stdout.readline())
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert ends(pid)


def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    code = "import time; from tcore.running import starter; server = starter.start(); "
    code += "print(server.pid, flush=True); time.sleep(60)"
    starting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(starting.stdout.readline())
    starting.kill()
    starting.wait()
    assert ends(pid)


def ends(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False
