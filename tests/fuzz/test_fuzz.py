"""A short run of the fuzzer finds nothing. `make fuzz` is the long one."""

import subprocess
import sys

from tests.system.running import ROOT

COUNTS = ("--messages", "8000", "--bodies", "400", "--images", "60")


def test_random_messages_and_bodies_end_nothing_and_leave_nothing() -> None:
    """In a process of its own, because the fuzzer replaces the clock."""
    command = [sys.executable, "-m", "tests.fuzz", *COUNTS]
    done = subprocess.run([*command, "--workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
