"""How much memory is free, asked before much is needed: a process that the system ends leaves no message."""

from pathlib import Path

from tcore.files import InputError

GROUP = Path("/sys/fs/cgroup")


def free() -> int | None:
    """Bytes that are free, of the machine or, where that is less, of the container; None if unknown."""
    found = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        used = int((GROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        found.append(int((GROUP / "memory.max").read_text()) - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no container, or "max": no limit
        pass
    return min(found, default=None)


def require(needed: int, available: int | None, where: str, remedy: str) -> None:
    """An InputError where `needed` bytes are more than are available."""
    if available is not None and needed > available:
        raise InputError(
            f"{where} needs about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free; {remedy}"
        )
