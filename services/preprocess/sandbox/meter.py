"""The limits of a sandbox, and the note of what it is busy with, which outlives it."""

import mmap
import resource
import signal
import struct
from pathlib import Path

from common.messages import ItemKind

MEMORY_BYTES = 512 * 2**20
"""How much memory a job may take beyond that of a sandbox without work."""
CPU_SECONDS = 3.0
"""The CPU time of one unit of a job: of one image, of the headers of all items, one template, one
grammar."""
ITEM_SECONDS: dict[ItemKind, float] = {"image": CPU_SECONDS, "video": 30.0}
"""The CPU time to prepare an item. A video may have thousands of frames between those it takes."""
WALL_FACTOR = 10.0
"""A unit may take this many times its CPU time by the clock: the machine may be busy."""
MARK = struct.Struct("q")

# What a sandbox is busy with: the index of an item, or one of these.
NOTHING = -1
TEMPLATE = -2
TOKENIZER = -3
GUIDE = -4


class Meter:
    """Limits the units of a job. The kernel ends the process at the limit, whatever it executes."""

    def __init__(self, mark: mmap.mmap | None = None) -> None:
        """`mark` is memory that the work loop shares. Without it, nothing is limited."""
        self._mark = mark

    def begin(self, unit: int, cpu_seconds: float = CPU_SECONDS) -> None:
        """Begin a unit, which is an index of an item or one of the constants above."""
        self.note(unit)
        if self._mark is not None:
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * cpu_seconds)

    def note(self, unit: int) -> None:
        """Go on to another unit within the limit of the present one."""
        if self._mark is not None:
            MARK.pack_into(self._mark, 0, unit)

    def end(self) -> None:
        """End the last unit of a job."""
        if self._mark is not None:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            MARK.pack_into(self._mark, 0, NOTHING)


def read_mark(mark: mmap.mmap) -> int:
    """Return what the sandbox of this mark is, or was, busy with."""
    (unit,) = MARK.unpack_from(mark, 0)
    return int(unit)


def limit_memory() -> None:
    """Let this process take MEMORY_BYTES more than it has now. Shared memory does not count."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + MEMORY_BYTES, hard))


def private_bytes() -> int:
    """Return the bytes of this process that RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [found] = [line for line in lines if line.startswith("VmData:")]
    return 1024 * int(found.split()[1])
