"""The CPU time and memory that processes use, read from /proc."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Cpu:
    """Seconds of CPU of some processes since their start, and of all cores since the machine's."""

    by_pid: dict[int, float]
    busy: float
    idle: float


def cpu_of(pids: list[int]) -> Cpu:
    """Read the CPU time of processes. An unlisted child's time counts as its parent's."""
    fields = [
        int(ticks) / TICKS_A_SECOND
        for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ]
    idle = fields[3] + fields[4]
    # The time of guests is already included in that of users.
    listed = set(pids)
    by_pid = {pid: sum(map(seconds_of, with_children(pid, listed))) for pid in pids}
    return Cpu(by_pid, sum(fields[:8]) - idle, idle)


def with_children(pid: int, listed: set[int]) -> list[int]:
    """Return a process and all that descend from it, apart from those that are listed."""
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                if child not in listed:
                    found += with_children(child, listed)
    return found


def seconds_of(pid: int) -> float:
    """Return user and system time together; 0 if the process is gone."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND
    return 0.0


def resident_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return total
