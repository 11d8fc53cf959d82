"""Locks of the dead are removed, locks of the living are not; the living are other processes."""

import signal
import subprocess
import sys

import pytest

from tcore.running import alive

ENTER = (
    "import sys, time; from tcore.running import alive; it = alive.enter(sys.argv[1]); "
    "print('in', flush=True); "
)


@pytest.fixture
def enter(tmp_path):
    """Starts another process that enters, leaves a lock behind if told so, and waits to be killed."""
    started = []

    def start(lock: bool) -> subprocess.Popen:
        leave = f"open({str(tmp_path / 'locks/0.output.lock')!r}, 'w'); print('locked', flush=True); "
        command = [sys.executable, "-c", ENTER + leave * lock + "time.sleep(60)", str(tmp_path)]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(run)
        for _ in range(1 + lock):
            run.stdout.readline()
        return run

    (tmp_path / "locks").mkdir()
    yield start
    for run in started:
        run.kill()
        run.wait()


def locks(folder) -> list[str]:
    return [path.name for path in (folder / "locks").iterdir()]


def test_locks_of_a_killed_run_go_and_those_of_a_live_one_stay(tmp_path, enter):
    first = enter(lock=True)
    with alive.enter(tmp_path):
        assert locks(tmp_path) == ["0.output.lock"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert locks(tmp_path) == ["0.output.lock"]
    with alive.enter(tmp_path):
        assert locks(tmp_path) == []


def test_one_live_run_of_two_is_enough_to_keep_the_locks(tmp_path, enter):
    first, second = enter(lock=True), enter(lock=False)
    first.kill()
    first.wait()
    with alive.enter(tmp_path):
        assert locks(tmp_path) == ["0.output.lock"]
    second.kill()
    second.wait()
    alive.enter(tmp_path).close()
    assert locks(tmp_path) == []


def test_a_folder_that_is_not_there_yet(tmp_path):
    with alive.enter(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
