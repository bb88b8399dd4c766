"""Ends a process with everything that it started, wherever that may have gone."""

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
END_SECONDS = 5.0
PAUSE_SECONDS = 0.01


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, daemons included (Linux only)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Be interrupted when this process's parent ends in any way (Linux only)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def parents() -> dict[int, int]:
    """Return the parent of every process, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # Its process may end at any time.
            with suppress(OSError, IndexError):
                found[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
    return found


def descendants(ancestor: int) -> list[int]:
    """Return all processes that descend from this one, itself not included."""
    parent_of = parents()
    found = [ancestor]
    for pid in found:
        found += [child for child, parent in parent_of.items() if parent == pid]
    return found[1:]


def end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End a process and all its descendants.

    It is interrupted first, and has some seconds to stop what it started.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    kill_all(descendants(process.pid))
    process.kill()
    process.wait()


def end_orphans() -> None:
    """Kill every process that descends from this one, adopted ones included."""
    deadline = time.monotonic() + END_SECONDS
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        kill_all(left)
        # A killed process stays in the list until its parent has waited for it.
        with suppress(ChildProcessError):
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(PAUSE_SECONDS)


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
