"""How long the threads of this process have waited for a core that other processes used."""

import threading
from pathlib import Path

TASKS = Path("/proc/self/task")
NANOSECONDS = 1e9


class Starvation:
    """Reads the scheduler's figures of the threads, which Linux counts in nanoseconds."""

    def __init__(self, tasks: Path = TASKS) -> None:
        self._tasks = tasks
        self._delays: dict[str, int] = {}

    def since_last(self) -> float:
        """Return how many seconds the thread that starved most has waited since the last call.

        A unit of work is as slow as its slowest thread. The caller's own thread does not count,
        because it only watches. Threads that are new since the last call count from the next one.
        """
        before = self._delays
        self._delays = self._read()
        waited = (
            delay - before[thread] for thread, delay in self._delays.items() if thread in before
        )
        return max(waited, default=0) / NANOSECONDS

    def _read(self) -> dict[str, int]:
        """Return the run-queue delay by thread; empty if this kernel does not count it."""
        own = str(threading.get_native_id())
        delays = {}
        for task in self._tasks.glob("[0-9]*"):
            try:
                fields = (task / "schedstat").read_text(encoding="utf-8").split()
            except OSError:  # the thread has ended
                continue
            if task.name != own:
                delays[task.name] = int(fields[1])
        return delays
