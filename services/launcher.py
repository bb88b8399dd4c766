"""`twinlens serve`: every service of one machine as a child process; starts, watches, restarts and stops them."""

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.address import host_port
from common.checkpoint import BadCheckpoint
from common.config import BadSetting, flag
from common.logs import get_logger, set_up_logging, wants_console
from common.membership import READY, Membership
from common.process import EXIT_FAILED, EXIT_USAGE
from common.settings import SERVICES, ServeSettings
from proto.twinlens.control.v1 import control_pb2
from services.sample import show_sample
from services.serve_checks import check

MAX_FAILED_STARTS = 5
FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS = 0.5, 8.0
GATEWAY_STOP_SECONDS, STOP_SECONDS = 5.0, 2.5
"""From SIGTERM to SIGKILL; the gateway's own grace for what is in flight is shorter."""
LAST_LINES = 8
TUNING = {"OMP_WAIT_POLICY": "passive", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Threads that wait sleep, because vision and language share the cores; large tensors lie on huge pages (docs/decisions.md)."""
LONG_LIFE_SECONDS = 30.0
RELAY_SECONDS = 1.0
"""For the last words of a child that died to come through."""


@dataclass(slots=True)
class Child:
    """A service that is to run. `process` is None between a death and the next start."""

    role: str
    name: str
    arguments: list[str]
    process: subprocess.Popen[bytes] | None = None
    status: int = 0
    was_ready: bool = False
    failed_starts: int = 0
    early_deaths: int = 0
    started: float = 0.0
    start_at: float = 0.0
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    relay: threading.Thread | None = None
    group: str = ""
    """Of a language group with several ranks: they live and die together."""
    num_starts: int = 0

    @property
    def is_hopeless(self) -> bool:
        """What it was told cannot be, or it fails time and again."""
        return self.failed_starts > 0 and (self.status == EXIT_USAGE or self.failed_starts >= MAX_FAILED_STARTS)


class Launcher:
    def __init__(self, settings: ServeSettings, run_dir: Path) -> None:
        self._settings, self._run_dir = settings, run_dir
        self._children = [self._child(role, n) for role, count in counts(settings).items() for n in range(count)]
        self._children += [self._rank(f"llm-{group}", rank) for group in range(settings.llm) for rank in range(settings.tp)]
        # Not an Event: this is also put to by signal handlers, which must not wait for a lock that their own thread holds.
        self._changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping = False
        self._ready_pids: set[int] = set()
        self._log = get_logger()

    def run(self) -> int:
        """Until SIGINT or SIGTERM, or until a service cannot be kept running. Gives the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        membership = Membership(self._control, None, lambda: (0, 0), self._on_members)
        announced = False
        try:
            while not self._stopping:
                if broken := self._keep_running():
                    times = f"{broken.failed_starts} starts in a row" if broken.failed_starts > 1 else "to start"
                    print(f"twinlens serve: {broken.name} failed {times}. Its last words:", *broken.last_lines, sep="\n", file=sys.stderr)
                    return broken.status if broken.status == EXIT_USAGE else EXIT_FAILED
                if not announced and self._all_ready():
                    announced = True
                    threading.Thread(target=self._announce, daemon=True).start()
                self._wait()
            return 0
        finally:
            membership.leave()
            self._stop_all()

    @property
    def _control(self) -> str:
        return f"unix:{self._run_dir}/control.sock"

    def _rank(self, group: str, rank: int) -> Child:
        child = self._child(
            "llm", 0, name=group if rank == 0 else f"{group}.{rank}", group=group, rank=rank, local_groups=self._settings.llm
        )
        child.group = group
        return child

    def _child(self, role: str, n: int, name: str = "", **own: Any) -> Child:
        name = name or f"{role}-{n}"
        arguments = own | {
            "controller": self._control,
            "control_listen": self._control,
            "listen": f"ipc://{self._run_dir}/{name}.sock",
            "name": name,
            "log_format": "console" if wants_console(self._settings.log_format) else "json",
            "die_with_parent": os.getpid(),
        }
        given = {f.name: getattr(self._settings, f.name) for f in fields(self._settings)}
        chosen = (given | arguments).items()
        known = {f.name for f in fields(SERVICES[role])}
        return Child(role, name, [f"{flag(k)}={v}" for k, v in chosen if k in known and v is not None])

    def _keep_running(self) -> Child | None:
        """Starts what is due; gives a child that failed too many starts in a row."""
        for child in self._children:
            if child.process is None and self._is_due(child):
                self._start(child)
            elif child.process is not None and child.process.poll() is not None:
                self._bury(child)
                if child.is_hopeless:
                    return child
                for rank in self._others_of(child):
                    signal_child(rank, signal.SIGKILL)
        return None

    def _is_due(self, child: Child) -> bool:
        return time.monotonic() >= child.start_at and not self._is_outlived(child)

    def _is_outlived(self, child: Child) -> bool:
        """Whether a rank of its group is still there that it met: a new group meets anew, when all of the old one are gone."""
        return any(r.process is not None and r.num_starts <= child.num_starts for r in self._others_of(child))

    def _others_of(self, child: Child) -> list[Child]:
        return [other for other in self._children if child.group and other.group == child.group and other is not child]

    def _start(self, child: Child) -> None:
        child.num_starts += 1
        # A process group of its own: Ctrl-C at the terminal is ours alone, and the children end in order.
        child.process = subprocess.Popen(
            command_of(child, self._run_dir),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
            env=child_environment(),
        )
        child.was_ready, child.started = False, time.monotonic()
        child.last_lines.clear()
        child.relay = threading.Thread(target=relay, args=(child, child.process), daemon=True)
        child.relay.start()
        threading.Thread(target=self._await_death, args=(child.process,), daemon=True).start()

    def _bury(self, child: Child) -> None:
        """Plans the next start: at once after a long life, later and later where it dies soon or does not get ready."""
        assert child.process is not None and child.relay is not None
        child.relay.join(RELAY_SECONDS)
        child.status = child.process.returncode
        child.failed_starts = 0 if child.was_ready else child.failed_starts + 1
        lived = time.monotonic() - child.started
        child.early_deaths = 0 if child.was_ready and lived > LONG_LIFE_SECONDS else child.early_deaths + 1
        wait = min(FIRST_BACKOFF_SECONDS * 2 ** (child.early_deaths - 2), LAST_BACKOFF_SECONDS) if child.early_deaths > 1 else 0.0
        child.process, child.start_at = None, time.monotonic() + wait
        self._log.warning(
            "service ended, starting it anew", name=child.name, status=child.status, failed_starts=child.failed_starts, wait=wait
        )

    def _await_death(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._changed.put(None)

    def _wait(self) -> None:
        """Until a child died, a member changed, a signal came, or a start is due that needs no death before it."""
        due = [child.start_at - time.monotonic() for child in self._children if child.process is None and not self._is_outlived(child)]
        with contextlib.suppress(queue.Empty):
            self._changed.get(timeout=max(0.0, min(due)) if due else None)

    def _on_signal(self, *_: object) -> None:
        if self._stopping:  # a second Ctrl-C: at once
            for child in self._children:
                signal_child(child, signal.SIGKILL)
        self._stopping = True
        self._changed.put(None)

    def _on_members(self, members: list[control_pb2.Member]) -> None:
        self._ready_pids = {m.pid for m in members if m.state == READY}
        for child in self._children:
            process = child.process  # read once: this is the membership's thread
            if process is not None and process.pid in self._ready_pids:
                child.was_ready, child.failed_starts = True, 0
        self._changed.put(None)

    def _all_ready(self) -> bool:
        return all(child.process is not None and child.process.pid in self._ready_pids for child in self._children)

    def _announce(self) -> None:
        s = self._settings
        http, grpc = host_port(s.host, s.http_port), host_port(s.host, s.grpc_port)
        if s.read:
            show_sample(grpc, Path(s.read))
        print(f"Twinlens serves {s.served_model_name!r}: OpenAI HTTP on http://{http}/v1, gRPC on {grpc}. Ctrl-C stops it.", flush=True)

    def _stop_all(self) -> None:
        """The gateway first, so that what is in flight can end; then the others; the controller last. Who takes too long is killed."""
        self._stopping = True
        others = [role for role in SERVICES if role not in ("gateway", "controller")]
        for roles, seconds in ((["gateway"], GATEWAY_STOP_SECONDS), (others, STOP_SECONDS), (["controller"], STOP_SECONDS)):
            children = [child for child in self._children if child.role in roles]
            for child in children:
                signal_child(child, signal.SIGTERM)
            deadline = time.monotonic() + seconds
            for child in children:
                wait_for(child, deadline)


def counts(settings: ServeSettings) -> dict[str, int]:
    """How many processes of each role; the language groups' ranks come beside."""
    return {
        "controller": 1,
        "gateway": 1,
        "detokenizer": settings.detokenizer,
        "preprocess": settings.preprocess,
        "vision": settings.vision,
    }


def command_of(child: Child, run_dir: Path) -> list[str]:
    meet = [f"--rendezvous=file://{run_dir}/{child.group}.{child.num_starts}.meet"] if child.group else []
    return [sys.executable, "-m", f"services.{child.role}", *child.arguments, *meet]


def relay(child: Child, process: subprocess.Popen[bytes]) -> None:
    """The child's log lines go through, and the last ones are kept: they tell why it died."""
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            child.last_lines.append(line.decode(errors="replace").rstrip())
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


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


def child_environment() -> dict[str, str]:
    """Settings go by flag, so that a TWINLENS_* of the launcher's own does not reach a child; and the folder that `serve` is
    called in must not provide a package `services`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("TWINLENS_")}
    return TUNING | own | {"PYTHONSAFEPATH": "1"}


def serve(settings: ServeSettings) -> int:
    """Runs everything until it is told to stop. Gives the exit status."""
    set_up_logging("launcher", settings.log_format, settings.log_level)
    try:
        settings = check(settings)
    except (BadSetting, BadCheckpoint) as e:
        print(f"twinlens serve: {e}", file=sys.stderr)
        return EXIT_USAGE
    run_dir = Path(tempfile.mkdtemp(prefix="twinlens-"))
    try:
        return Launcher(settings, run_dir).run()
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
