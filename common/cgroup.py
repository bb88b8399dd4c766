"""The cores and memory that a container may use, by its control group (version 2 or 1)."""

import contextlib
import os
import sys
from math import ceil
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def core_limit(root: Path = ROOT) -> int | None:
    """Return the limit of CPU time as a number of cores, rounded up; None without a limit."""
    found = words(root / "cpu.max") or words(root / "cpu/cpu.cfs_quota_us") + words(
        root / "cpu/cpu.cfs_period_us"
    )
    if len(found) != 2 or found[0] in ("max", "-1"):
        return None
    return ceil(int(found[0]) / int(found[1]))


def num_cores() -> int:
    """Return the number of cores that this process may use, by affinity and control group."""
    return min(len(os.sched_getaffinity(0)), core_limit() or sys.maxsize)


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes that the host has free, or that the container's limit leaves, if fewer."""
    return min(
        [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *container_memory(root)]
    )


def container_memory(root: Path = ROOT) -> list[int]:
    """Return the bytes that each memory limit of this container leaves; empty without a limit."""
    left = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            left.append(max(0, read_number(root / limit) - read_number(root / used)))
    return left


def read_number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


def words(file: Path) -> list[str]:
    """Return the words of a file; empty if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []
