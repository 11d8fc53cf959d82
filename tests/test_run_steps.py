"""Steps without Snakemake, of plans written by hand; a real one is in test_reruns.py."""

import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/tools/run_steps.py"
PLAN = """Job stats:
Shell command: cp data/own/a.txt data/made/b.txt > data/logs/b.log 2>&1
Reason: Missing output files: data/made/b.txt
Shell command: cat data/made/b.txt data/made/b.txt > data/made/c.txt
Shell command: cp data/own/a.txt data/made/d.txt
Shell command: ls --data data > data/made/all.txt
"""


def run_steps(folder: Path, plan: str, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "plan.txt").write_text(plan)
    command = [sys.executable, str(SCRIPT), "plan.txt", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_step_waits_for_those_that_make_what_it_names():
    steps = runpy.run_path(str(SCRIPT))["read_plan"](PLAN)
    assert [set(step.after) for step in steps] == [set(), {0}, {0}, {0, 1, 2}]
    assert [[str(file) for file in step.makes] for step in steps] == [
        ["data/own/a.txt", "data/made/b.txt"],
        ["data/made/c.txt"],
        ["data/made/d.txt"],
        ["data/made/all.txt"],
    ]


def test_what_is_there_is_not_made_again_and_what_failed_is_named(tmp_path):
    (tmp_path / "data/own").mkdir(parents=True)
    (tmp_path / "data/own/a.txt").write_text("a")
    plan = PLAN.replace("ls --data data", "false --data data || ls data")
    assert run_steps(tmp_path, plan, "--jobs", "2").returncode == 0
    made = tmp_path / "data/made"
    assert (made / "c.txt").read_text() == "aa" and (made / "all.txt").exists()
    (made / "b.txt").write_text("another")
    (made / "c.txt").unlink()
    (tmp_path / "data/own/a.txt").unlink()
    (made / "d.txt").unlink()
    run = run_steps(tmp_path, plan)
    assert run.returncode == 1 and "failed: cp data/own/a.txt data/made/b.txt" in run.stderr
    assert "error: steps that failed: 1, that wait for those: 2" in run.stderr


def test_a_file_that_is_no_plan(tmp_path):
    assert "no steps; it should be what snakemake -n -p printed" in run_steps(tmp_path, "Nothing").stderr
