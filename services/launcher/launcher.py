"""`twinlens serve`: every service of one machine as a child process; starts, watches, restarts,
scales and stops them."""

import contextlib
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.address import host_port
from common.checkpoint import BadCheckpoint
from common.config import BadSetting, flag
from common.logs import get_logger, set_up_logging, wants_console
from common.membership import DEAD, READY, STANDBY, Membership
from common.process import EXIT_FAILED, EXIT_USAGE
from common.settings import SCALABLE_ROLES, SERVICES, ServeSettings
from proto.twinlens.control.v1 import control_pb2
from services.commands.sample import show_sample
from services.launcher.autoscale import Autoscaler, parse_bounds
from services.launcher.checks import check
from services.launcher.child import (
    Child,
    schedule_restart,
    signal_child,
    start,
    stop_child,
    wait_for,
)
from services.launcher.fleet import Fleet

GATEWAY_STOP_SECONDS = 5.0
STOP_SECONDS = 2.5
"""From SIGINT to SIGKILL; the gateway's own grace for what is in flight is shorter."""
DRAIN_MARGIN_SECONDS = 10.0
"""Beyond the request timeout, by which the last request has ended."""
FROZEN_SECONDS = 10.0
"""After its lease ended a process that still exists may come back for so long."""


class Launcher:
    def __init__(self, settings: ServeSettings, run_dir: Path) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._log = get_logger()
        self._autoscaler = (
            Autoscaler(parse_bounds(settings.autoscale)) if settings.autoscale else None
        )
        self._fleet = Fleet(
            counts(settings),
            settings.vision_standby,
            self._make,
            settings.request_timeout + DRAIN_MARGIN_SECONDS,
        )
        # What happened, for the main thread. Not an Event: signal handlers put to it, and must not
        # wait for a lock.
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._draining = self._stopping = self._announced = False
        self._membership: Membership | None = None
        self._managed = self._state()

    def run(self) -> int:
        """Until SIGINT, or until it has drained after SIGTERM, or until a service cannot be kept
        running. Gives the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        nothing = lambda: (0, 0)  # noqa: E731
        hear = lambda response: self._news.put(lambda: self._hear(response))  # noqa: E731
        self._membership = Membership(
            self._control, None, nothing, managed=lambda: self._managed, on_response=hear
        )
        try:
            while not self._stopping:
                if broken := self._keep_running():
                    times = (
                        f"{broken.failed_starts} starts in a row"
                        if broken.failed_starts > 1
                        else "to start"
                    )
                    print(
                        f"twinlens serve: {broken.name} failed {times}. Its last words:",
                        *broken.last_lines,
                        sep="\n",
                        file=sys.stderr,
                    )
                    return broken.status if broken.status == EXIT_USAGE else EXIT_FAILED
                if self._has_drained():
                    break
                if not self._announced and self._all_ready():
                    self._announced = True
                    threading.Thread(target=self._announce, daemon=True).start()
                self._tell_managed()
                self._wait()
            return 0
        finally:
            self._membership.leave()
            self._stop_all()

    def _has_drained(self) -> bool:
        return self._draining and not any(
            replica.role == "gateway" for replica in self._fleet.replicas
        )

    @property
    def _control(self) -> str:
        return f"unix:{self._run_dir}/control.sock"

    # The children

    def _make(self, role: str, number: int) -> list[Child]:
        if role != "llm":
            return [self._child(role, f"{role}-{number}")]
        group = f"llm-{number}"
        ranks = range(self._settings.tp)
        name = lambda rank: group if rank == 0 else f"{group}.{rank}"  # noqa: E731
        local_groups = max(self._settings.llm, number + 1)
        return [
            self._child(role, name(rank), group=group, rank=rank, local_groups=local_groups)
            for rank in ranks
        ]

    def _child(self, role: str, name: str, group: str = "", **own: Any) -> Child:
        arguments = own | {
            "controller": self._control,
            "control_listen": self._control,
            "listen": f"ipc://{self._run_dir}/{name}.sock",
            "name": name,
            "group": group,
            "drain_delay": 0.0,
            "log_format": "console" if wants_console(self._settings.log_format) else "json",
            "die_with_parent": os.getpid(),
        }
        given = {f.name: getattr(self._settings, f.name) for f in fields(self._settings)}
        chosen = (given | arguments).items()
        known = {f.name for f in fields(SERVICES[role])}
        return Child(
            role, name, [f"{flag(k)}={v}" for k, v in chosen if k in known and v is not None], group
        )

    def _keep_running(self) -> Child | None:
        """Starts what is due and ends what is not wanted; gives a child without which there is no
        going on."""
        for child in self._fleet.children:
            if (
                child.process is not None
                and child.process.poll() is not None
                and (broken := self._take_death(child))
            ):
                return broken
        self._fleet.reconcile()
        for child in self._fleet.children:
            if child.process is None and self._is_due(child):
                start(child, self._run_dir, lambda: self._news.put(lambda: None))
        return None

    def _take_death(self, child: Child) -> Child | None:
        replica = self._fleet.replica_of(child)
        wait = schedule_restart(child)
        for rank in replica.children:
            signal_child(rank, signal.SIGKILL)
        if replica.retired is not None:
            self._log.info("service ended", name=child.name, status=child.status)
            return None
        self._log.warning(
            "service ended, starting it anew",
            name=child.name,
            status=child.status,
            failed_starts=child.failed_starts,
            wait=wait,
        )
        if child.is_hopeless:
            if not self._announced or not self._fleet.can_spare(replica):
                return child
            self._log.error("given up", name=child.name, last_words=list(child.last_lines))
            self._fleet.give_up(replica)
        return None

    def _is_due(self, child: Child) -> bool:
        return time.monotonic() >= child.start_at and not self._waits(child)

    def _waits(self, child: Child) -> bool:
        """Whether it is not to start, or a rank of its group is still there that it met: a new
        group meets anew, when all of the old one are gone."""
        replica = self._fleet.replica_of(child)
        met = [
            r
            for r in replica.children
            if r is not child and r.process is not None and r.num_starts <= child.num_starts
        ]
        return replica.retired is not None or bool(met)

    def _wait(self) -> None:
        """Until something happened, or a start is due that needs no death before it, or the
        patience with a replica ends."""
        due = [c.start_at for c in self._fleet.children if c.process is None and not self._waits(c)]
        due += [moment for moment in [self._fleet.next_deadline()] if moment is not None]
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=max(0.0, min(due) - time.monotonic()) if due else None)()

    # What others say

    def _on_signal(self, number: int, _: object) -> None:
        """SIGTERM drains, SIGINT stops; each further signal goes a step further, from draining to
        stopping to killing."""
        if self._stopping:  # the main thread waits for the children's end
            for child in self._fleet.children:
                signal_child(child, signal.SIGKILL)
        self._news.put(lambda: self._obey(number))

    def _obey(self, number: int) -> None:
        if number == signal.SIGTERM and not self._draining:
            self._draining = True
            self._fleet.wanted["gateway"] = (
                0  # it owns every request: when it has drained, nobody holds anything
            )
        else:
            self._stopping = True

    def _hear(self, response: control_pb2.JoinResponse) -> None:
        self._take_members({member.pid: member for member in response.members})
        self._take_out({*response.drained})
        for role, wanted in response.wanted.items():
            if role in SCALABLE_ROLES and wanted != self._fleet.wanted[role]:
                self._log.info(
                    "scaling", role=role, replicas=wanted, before=self._fleet.wanted[role]
                )
                self._fleet.wanted[role] = wanted
        if self._autoscaler and self._announced:
            self._autoscale(self._autoscaler)

    def _take_members(self, members: dict[int, control_pb2.Member]) -> None:
        for child in self._fleet.children:
            if child.process is None:
                continue
            child.member = members.get(child.process.pid, child.member)
            if child.is_in(READY, STANDBY):
                child.was_ready = True
                child.failed_starts = 0
            if reason := self._hang_of(child):
                self._log.error("killed", name=child.name, reason=reason)
                signal_child(child, signal.SIGKILL)

    def _hang_of(self, child: Child) -> str:
        """Why the process must be killed: its work makes no progress, or it as a whole is
        frozen."""
        if not child.is_in(DEAD):
            child.dead_since = None
            return (
                "hung: its work makes no progress"
                if child.member is not None and child.member.hung
                else ""
            )
        child.dead_since = child.dead_since or time.monotonic()
        return (
            f"frozen: silent for {FROZEN_SECONDS:.0f} s"
            if time.monotonic() - child.dead_since > FROZEN_SECONDS
            else ""
        )

    def _take_out(self, member_ids: set[str]) -> None:
        for replica in self._fleet.replicas:
            if any(
                child.member is not None and child.member.id in member_ids
                for child in replica.children
            ):
                bounded = self._autoscaler if replica.role == "vision" else None
                self._fleet.take_out(replica, least=bounded.bounds.least if bounded else 1)

    def _autoscale(self, autoscaler: Autoscaler) -> None:
        before = self._fleet.wanted["vision"]
        wanted = autoscaler.wanted(self._fleet.sample_vision())
        if wanted != before:
            self._log.info("scaling", role="vision", replicas=wanted, before=before, by="autoscale")
            self._fleet.wanted["vision"] = wanted

    def _tell_managed(self) -> None:
        """The controller hears of what is wanted now, however it came about."""
        managed = self._state()
        if managed != self._managed:
            self._managed = managed
            if self._membership:
                self._membership.report()

    def _state(self) -> control_pb2.Managed:
        autoscaled = {"vision": str(self._autoscaler.bounds)} if self._autoscaler else {}
        return control_pb2.Managed(
            replicas={role: self._fleet.wanted[role] for role in SCALABLE_ROLES},
            autoscaled=autoscaled,
        )

    def _all_ready(self) -> bool:
        return all(child.is_in(READY, STANDBY) for child in self._fleet.children)

    def _announce(self) -> None:
        s = self._settings
        http = host_port(s.host, s.http_port)
        grpc = host_port(s.host, s.grpc_port)
        if s.read:
            show_sample(grpc, Path(s.read))
        print(
            f"Twinlens serves {s.served_model_name!r}: OpenAI HTTP on http://{http}/v1, gRPC on "
            f"{grpc}. Ctrl-C stops it.",
            flush=True,
        )

    def _stop_all(self) -> None:
        """The gateway first, so that what is in flight can end; then the others; the controller
        last. Who takes too long is killed."""
        self._stopping = True
        others = [role for role in SERVICES if role not in ("gateway", "controller")]
        for roles, seconds in (
            (["gateway"], GATEWAY_STOP_SECONDS),
            (others, STOP_SECONDS),
            (["controller"], STOP_SECONDS),
        ):
            children = [child for child in self._fleet.children if child.role in roles]
            for child in children:
                stop_child(child)
            deadline = time.monotonic() + seconds
            for child in children:
                wait_for(child, deadline)


def counts(settings: ServeSettings) -> dict[str, int]:
    """How many replicas of each role there are to be at first."""
    vision = (
        max(settings.vision, parse_bounds(settings.autoscale).least)
        if settings.autoscale
        else settings.vision
    )
    return {
        "controller": 1,
        "gateway": 1,
        "detokenizer": settings.detokenizer,
        "preprocess": settings.preprocess,
        "vision": vision,
        "llm": settings.llm,
    }


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
