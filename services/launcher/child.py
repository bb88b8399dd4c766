"""One service as a child process of the launcher: its command, start, exit and restart."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.logs import get_logger
from common.process import EXIT_OK, EXIT_USAGE
from common.tuning import with_tuning
from proto.twinlens.control.v1 import control_pb2

MAX_FAILED_STARTS = 5
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 8.0
NUM_LAST_LINES = 8
MAX_LINE_BYTES = 64 * 1024
"""What is copied of a child's log at a time, which is a line unless the line is longer."""
MAX_LAST_LINE_CHARS = 2000
LONG_LIFE_SECONDS = 30.0
"""A child that was ready and ran for this long is restarted without a delay."""
RELAY_SECONDS = 1.0
"""How long to wait for the last output of a child that exited."""


@dataclass(slots=True)
class Child:
    """A service that should run. `process` is None between an exit and the next start."""

    role: str
    name: str
    arguments: list[str]
    group: str = ""
    """The language group of a rank, else empty. The ranks of a group start and end together."""
    is_standby: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    """What its processes get besides the environment that all children of its role get."""
    process: subprocess.Popen[bytes] | None = None
    member: control_pb2.Member | None = None
    """The last report of the controller about this process; `is_reported_as` says which one is."""
    dead_since: float | None = None
    """When the controller first reported this live process dead."""
    status: int = EXIT_OK
    """The exit status of the last process."""
    was_ready: bool = False
    failed_starts: int = 0
    early_exits: int = 0
    started_at: float = 0.0
    start_at: float = 0.0
    """When the next start is due."""
    num_starts: int = 0
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_LAST_LINES))
    relay: threading.Thread | None = None

    @property
    def cannot_start(self) -> bool:
        """Whether to give up: its settings were refused, or it failed several times in a row."""
        return self.failed_starts > 0 and (
            self.status == EXIT_USAGE or self.failed_starts >= MAX_FAILED_STARTS
        )

    def is_reported_as(self, member: control_pb2.Member) -> bool:
        """Whether a member that has the pid of this process is this process.

        A pid alone says nothing, because any member may report any pid.
        """
        if self.member is not None:
            return member.id == self.member.id
        name, _, _ = member.id.rpartition("-")
        return name == self.name and member.role == self.role

    def is_in(self, *states: "control_pb2.MemberState.ValueType") -> bool:
        return self.process is not None and self.member is not None and self.member.state in states


def start(child: Child, command: list[str], on_exit: Callable[[], None]) -> None:
    """Start the child's process. `on_exit` is called by another thread when it has exited.

    Raises
    ------
    OSError
        if there are too few descriptors, processes or threads.
    """
    # In a process group of its own a child does not receive the terminal's Ctrl-C. The launcher
    # does, and stops the children in order.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
        env=child_environment(child.role) | child.environment,
    )
    child.last_lines.clear()
    relay = threading.Thread(target=relay_logs, args=(child, process), daemon=True)
    waiter = threading.Thread(target=wait_for_exit, args=(process, on_exit), daemon=True)
    try:
        relay.start()
        waiter.start()
    except RuntimeError as e:
        process.kill()
        process.wait()
        raise OSError(errno.EAGAIN, str(e)) from e
    # A start that failed does not count: the ranks of a group count their starts together.
    child.num_starts += 1
    child.process = process
    child.relay = relay
    child.was_ready = False
    child.started_at = time.monotonic()


def wait_for_exit(process: subprocess.Popen[bytes], on_exit: Callable[[], None]) -> None:
    process.wait()
    on_exit()


def schedule_restart(child: Child) -> float:
    """Record the exit of a child, plan its next start, and return the seconds until then.

    The restart is immediate after a long life or a first early exit. The delay doubles with each
    further early exit, up to LAST_BACKOFF_SECONDS.
    """
    assert child.process is not None and child.relay is not None
    child.relay.join(RELAY_SECONDS)
    child.status = child.process.returncode
    child.failed_starts = 0 if child.was_ready else child.failed_starts + 1
    lived_long = time.monotonic() - child.started_at > LONG_LIFE_SECONDS
    child.early_exits = 0 if child.was_ready and lived_long else child.early_exits + 1
    delay = 0.0
    if child.early_exits > 1:
        doubled = FIRST_BACKOFF_SECONDS * 2 ** (child.early_exits - 2)
        delay = min(doubled, LAST_BACKOFF_SECONDS)
    child.process = None
    child.member = None
    child.dead_since = None
    child.start_at = time.monotonic() + delay
    return delay


def command_of(child: Child, run_dir: Path) -> list[str]:
    """Return the command that starts the child's service."""
    command = [sys.executable, "-m", f"services.{child.role}", *child.arguments]
    if child.group:
        # A new file for each start: ranks must not meet those of an earlier life.
        command.append(f"--rendezvous=file://{run_dir}/{child.group}.{child.num_starts}.meet")
    if child.is_standby:
        command.append("--standby")
    return command


def child_environment(role: str) -> dict[str, str]:
    """Return the environment of a child: the launcher's own, and the tuning of the child's role.

    The launcher's TWINLENS_* variables are left out, because children get their settings by flag.
    PYTHONSAFEPATH keeps a folder `services` in the working directory from being imported, and
    PYTHONUTF8 makes names of files UTF-8 in any locale.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("TWINLENS_")}
    return with_tuning(role, own) | {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}


def relay_logs(child: Child, process: subprocess.Popen[bytes]) -> None:
    """Copy the child's log to stderr, and keep its last lines, which say why it exited."""
    assert process.stderr is not None
    with process.stderr as log:
        while line := log.readline(MAX_LINE_BYTES):
            text = line[: 4 * MAX_LAST_LINE_CHARS].decode(errors="replace").rstrip()
            child.last_lines.append(text[:MAX_LAST_LINE_CHARS])
            # The child must be able to log even if nobody reads what we write.
            with contextlib.suppress(OSError):
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()


def stop_child(child: Child) -> None:
    """Ask the child to stop now, without draining.

    A child that is not yet a member holds nothing to drain, and may still be importing: SIGINT
    would end it with a traceback, so it gets SIGTERM.
    """
    signal_child(child, signal.SIGINT if child.member else signal.SIGTERM)


def signal_child(child: Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def wait_or_kill(child: Child, deadline: float) -> None:
    """Wait until the child has exited, and kill it at the deadline (of the monotonic clock)."""
    if child.process is None:
        return
    try:
        child.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        get_logger().warning("killed: it did not stop in time", name=child.name)
        child.process.kill()
        child.process.wait()
