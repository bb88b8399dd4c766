"""One service as a child process of the launcher: its command, its start, its death and when it is
due again."""

import contextlib
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
from common.process import EXIT_USAGE
from proto.twinlens.control.v1 import control_pb2

MAX_FAILED_STARTS = 5
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 8.0
LAST_LINES = 8
TUNING = {
    "OMP_WAIT_POLICY": "passive",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""Threads that wait sleep, because vision and language share the cores; large tensors lie on huge
pages; torch does not keep kernels for every length of prompt that ever came (docs/decisions.md)."""
LLM_TUNING = {"GOMP_SPINCOUNT": "1000"}
"""A step that is not one call of a kernel is over a hundred short products: its threads look for
the next one for a while before they sleep."""
LONG_LIFE_SECONDS = 30.0
RELAY_SECONDS = 1.0
"""For the last words of a child that died to come through."""


@dataclass(slots=True)
class Child:
    """A service that is to run. `process` is None between a death and the next start."""

    role: str
    name: str
    arguments: list[str]
    group: str = ""
    """Of a language group: its ranks live and die together."""
    is_standby: bool = False
    process: subprocess.Popen[bytes] | None = None
    member: control_pb2.Member | None = None
    """What the control plane said last of this process."""
    dead_since: float | None = None
    """When the control plane's word was first that its lease had ended, while the process is there.
    """
    status: int = 0
    was_ready: bool = False
    failed_starts: int = 0
    early_deaths: int = 0
    started: float = 0.0
    start_at: float = 0.0
    num_starts: int = 0
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    relay: threading.Thread | None = None

    @property
    def is_hopeless(self) -> bool:
        """What it was told cannot be, or it fails time and again."""
        return self.failed_starts > 0 and (
            self.status == EXIT_USAGE or self.failed_starts >= MAX_FAILED_STARTS
        )

    def is_in(self, *states: "control_pb2.MemberState.ValueType") -> bool:
        return self.process is not None and self.member is not None and self.member.state in states


def start(child: Child, run_dir: Path, on_death: Callable[[], None]) -> None:
    child.num_starts += 1
    # A process group of its own: Ctrl-C at the terminal is the launcher's alone, and the children
    # end in order.
    child.process = subprocess.Popen(
        command_of(child, run_dir),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
        env=child_environment(child.role),
    )
    child.was_ready = False
    child.started = time.monotonic()
    child.last_lines.clear()
    child.relay = threading.Thread(target=relay, args=(child, child.process), daemon=True)
    child.relay.start()
    threading.Thread(target=await_death, args=(child.process, on_death), daemon=True).start()


def await_death(process: subprocess.Popen[bytes], on_death: Callable[[], None]) -> None:
    process.wait()
    on_death()


def schedule_restart(child: Child) -> float:
    """Plans the next start: at once after a long life, later and later where it dies soon or does
    not get ready. Gives the seconds."""
    assert child.process is not None and child.relay is not None
    child.relay.join(RELAY_SECONDS)
    child.status = child.process.returncode
    child.failed_starts = 0 if child.was_ready else child.failed_starts + 1
    lived = time.monotonic() - child.started
    child.early_deaths = (
        0 if child.was_ready and lived > LONG_LIFE_SECONDS else child.early_deaths + 1
    )
    wait = (
        min(FIRST_BACKOFF_SECONDS * 2 ** (child.early_deaths - 2), LAST_BACKOFF_SECONDS)
        if child.early_deaths > 1
        else 0.0
    )
    child.process = None
    child.member = None
    child.dead_since = None
    child.start_at = time.monotonic() + wait
    return wait


def command_of(child: Child, run_dir: Path) -> list[str]:
    meet = (
        [f"--rendezvous=file://{run_dir}/{child.group}.{child.num_starts}.meet"]
        if child.group
        else []
    )
    standby = ["--standby"] if child.is_standby else []
    return [sys.executable, "-m", f"services.{child.role}", *child.arguments, *meet, *standby]


def child_environment(role: str) -> dict[str, str]:
    """Settings go by flag, so that a TWINLENS_* of the launcher's own does not reach a child; and
    the folder that `serve` is called in must not provide a package `services`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("TWINLENS_")}
    return TUNING | (LLM_TUNING if role == "llm" else {}) | own | {"PYTHONSAFEPATH": "1"}


def relay(child: Child, process: subprocess.Popen[bytes]) -> None:
    """The child's log lines go through, and the last ones are kept: they tell why it died."""
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            child.last_lines.append(line.decode(errors="replace").rstrip())
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


def stop_child(child: Child) -> None:
    """At once. One that has not joined may still be importing, where SIGINT would end in a
    traceback; it holds nothing that it could drain."""
    signal_child(child, signal.SIGINT if child.member else signal.SIGTERM)


def signal_child(child: Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def wait_for(child: Child, deadline: float) -> None:
    if child.process is None:
        return
    try:
        child.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        get_logger().warning("did not stop in time: killed", name=child.name)
        child.process.kill()
        child.process.wait()
