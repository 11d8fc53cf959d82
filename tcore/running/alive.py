"""Locks that a killed run left behind are removed; those of a run that lives are not.

Snakemake's locks are files, which outlive a `kill -9`. Every run therefore also holds a lock of the operating
system on one file. It is shared with other runs and ends with the process, however that ends: whoever gets it
for himself alone knows that nobody else is running. Where there are no such locks nothing is removed.
"""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import IO


def enter(folder: str | Path) -> IO:
    """Removes what lies in `folder`/locks if no other run is alive.

    The open file that it returns marks this run as alive until it is closed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "alive").open("a+")
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in (folder / "locks").glob("*"):
            lock.unlink()
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file
