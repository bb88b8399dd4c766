"""The children of one `twinlens serve`: started, watched, restarted, scaled and stopped."""

import secrets
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from common.logs import get_logger
from common.membership import DEAD, READY, STANDBY
from common.progress import UNMEASURED_SECONDS, Progress
from common.settings import SCALABLE_ROLES, SERVICES, ServeSettings
from proto.twinlens.control.v1 import control_pb2
from services.launcher.autoscale import Autoscaler, parse_bounds
from services.launcher.child import (
    LAST_BACKOFF_SECONDS,
    Child,
    command_of,
    schedule_restart,
    signal_child,
    start,
    stop_child,
    wait_or_kill,
)
from services.launcher.fleet import Fleet
from services.launcher.replicas import make_children, replica_counts

GATEWAY_STOP_SECONDS = 5.0
STOP_SECONDS = 2.5
"""From SIGINT to SIGKILL. It is longer than the gateway's own grace for requests in flight."""
DRAIN_MARGIN_SECONDS = 10.0
"""A drain may take this much longer than the request timeout, when the last request has ended."""
FROZEN_SECONDS = 10.0
"""How long a live process may stay dead for the controller, which ended its lease."""
CONTROLLER_SECONDS = 3.0
"""The expected time between two messages of the controller, which sends one a second; it is killed
after PATIENCE_FACTOR times as long."""
WATCH_SECONDS = 1.0
"""How often `keep_running` must be called at least, because it watches the controller."""

Command = Callable[[Child, Path], list[str]]


class Supervisor:
    """Keeps the children running. One thread uses it, and its signal handlers may call `kill_all`.

    `on_exit` is called by another thread whenever a child has exited: `keep_running` is then due.
    """

    def __init__(
        self,
        settings: ServeSettings,
        run_dir: Path,
        on_exit: Callable[[], None] = lambda: None,
        command: Command = command_of,
    ) -> None:
        self._run_dir = run_dir
        self._on_exit = on_exit
        self._command = command
        self._log = get_logger()
        self._autoscaler = (
            Autoscaler(parse_bounds(settings.autoscale)) if settings.autoscale else None
        )
        self._controller = Progress()
        """The controller reports the other members, so the launcher itself watches it."""
        self.key = secrets.token_hex()
        """What makes this launcher the launcher for the controllers that it starts."""
        self.is_draining = False
        self.has_come_up = False
        """Whether all children were ready at the same time at least once."""
        counts = replica_counts(settings)
        self._scalable_roles = [role for role in SCALABLE_ROLES if counts[role]]
        """Those that the model needs: the others have no replicas."""
        self.fleet = Fleet(
            counts,
            settings.vision_standby,
            lambda role, number: make_children(settings, run_dir, role, number),
            settings.request_timeout + DRAIN_MARGIN_SECONDS,
        )

    def keep_running(self) -> Child | None:
        """Restart exited children, and take every step towards the wanted replicas.

        Return a child that cannot start and that the system cannot do without, if there is one.
        """
        for child in self.fleet.children:
            has_exited = child.process is not None and child.process.poll() is not None
            if has_exited and not self._handle_exit(child):
                return child
        self.fleet.reconcile()
        for child in self.fleet.children:
            is_due = child.process is None and time.monotonic() >= child.start_at
            if is_due and not self._must_wait(child):
                self._start(child)
        self._kill_silent_controller()
        self.has_come_up = self.has_come_up or self.is_all_ready()
        return None

    def next_deadline(self) -> float | None:
        """Return when `keep_running` is due although nothing happens, or None if never.

        That is the next start that waits for its time only, or the end of the patience with a
        replica that drains.
        """
        deadlines = [
            child.start_at
            for child in self.fleet.children
            if child.process is None and not self._must_wait(child)
        ]
        fleet_deadline = self.fleet.next_deadline()
        if fleet_deadline is not None:
            deadlines.append(fleet_deadline)
        return min(deadlines, default=None)

    def is_all_ready(self) -> bool:
        return all(child.is_in(READY, STANDBY) for child in self.fleet.children)

    def managed(self) -> control_pb2.Managed:
        """Return what the controller should know: the wanted replicas and the autoscaled roles."""
        autoscaled = {"vision": str(self._autoscaler.bounds)} if self._autoscaler else {}
        replicas = {role: self.fleet.wanted[role] for role in self._scalable_roles}
        return control_pb2.Managed(replicas=replicas, autoscaled=autoscaled)

    def on_response(self, response: control_pb2.JoinResponse) -> None:
        """Handle the controller's view: the members, the drained ones, and the wanted replicas."""
        self._controller.begin(CONTROLLER_SECONDS)
        self._update_members(response.members)
        self._remove_drained(set(response.drained))
        for role, wanted in response.wanted.items():
            if role in SCALABLE_ROLES:
                self._scale(role, wanted, by="operator")
        if self._autoscaler and self.has_come_up:
            wanted = self._autoscaler.recommend(self.fleet.sample_vision())
            self._scale("vision", wanted, by="autoscaler")

    def drain(self) -> None:
        """Begin to drain the gateway, which owns every request: then nothing is left anywhere."""
        self.is_draining = True
        self.fleet.wanted["gateway"] = 0

    def has_drained(self) -> bool:
        has_gateway = any(replica.role == "gateway" for replica in self.fleet.replicas)
        return self.is_draining and not has_gateway

    def stop_all(self) -> None:
        """Stop every child, and kill those that take too long.

        The gateway stops first, so that requests in flight can end, and the controller last.
        """
        others = [role for role in SERVICES if role not in ("gateway", "controller")]
        for roles, seconds in (
            (["gateway"], GATEWAY_STOP_SECONDS),
            (others, STOP_SECONDS),
            (["controller"], STOP_SECONDS),
        ):
            children = [child for child in self.fleet.children if child.role in roles]
            for child in children:
                stop_child(child)
            deadline = time.monotonic() + seconds
            for child in children:
                wait_or_kill(child, deadline)

    def kill_all(self) -> None:
        for child in self.fleet.children:
            signal_child(child, signal.SIGKILL)

    def _start(self, child: Child) -> None:
        """Start the child's process, or try again later if there are no resources for it now."""
        if child.role == "controller":
            child.environment["TWINLENS_LAUNCHER_KEY"] = self.key
        try:
            start(child, self._command(child, self._run_dir), self._on_exit)
        except OSError as e:
            child.start_at = time.monotonic() + LAST_BACKOFF_SECONDS
            self._log.error(
                "cannot start a process now; trying again",
                name=child.name,
                reason=e.strerror or str(e),
                wait=LAST_BACKOFF_SECONDS,
            )
            return
        if child.role == "controller":
            self._controller.begin(UNMEASURED_SECONDS)

    def _kill_silent_controller(self) -> None:
        """Kill the controller if it is stopped or hangs. Members then join the next one."""
        self._controller.watch()
        if not self._controller.is_hung():
            return
        for child in self.fleet.children:
            if child.role == "controller" and child.process is not None:
                reason = f"silent for {self._controller.age():.0f} s"
                self._log.error("killed", name=child.name, reason=reason)
                signal_child(child, signal.SIGKILL)
        self._controller.idle()

    def _handle_exit(self, child: Child) -> bool:
        """Plan the restart of a child that exited. Return False if the system cannot do without it.

        The other ranks of its group are killed, because a group starts as a whole.
        """
        replica = self.fleet.replica_of(child)
        wait = schedule_restart(child)
        for rank in replica.children:
            signal_child(rank, signal.SIGKILL)
        if replica.is_retired:
            self._log.info("service exited", name=child.name, status=child.status)
            return True
        self._log.warning(
            "service exited, restarting it",
            name=child.name,
            status=child.status,
            failed_starts=child.failed_starts,
            wait=wait,
        )
        if not child.cannot_start:
            return True
        if not self.has_come_up or not self.fleet.can_spare(replica):
            return False
        last_lines = list(child.last_lines)
        self._log.error("gave up on a replica", name=child.name, last_lines=last_lines)
        self.fleet.abandon(replica)
        return True

    def _must_wait(self, child: Child) -> bool:
        """Whether an exited child must not start, however long it has waited.

        A retired one never starts again. A rank waits until all ranks of the group that it last
        belonged to have exited, because a new group needs all its ranks.
        """
        replica = self.fleet.replica_of(child)
        has_old_rank = any(
            rank.process is not None and rank.num_starts <= child.num_starts
            for rank in replica.children
            if rank is not child
        )
        return replica.is_retired or has_old_rank

    def _update_members(self, reported: Iterable[control_pb2.Member]) -> None:
        """Record the reports, and kill the children that hang."""
        members: defaultdict[int, list[control_pb2.Member]] = defaultdict(list)
        for member in reported:
            members[member.pid].append(member)
        for child in self.fleet.children:
            if child.process is None:
                continue
            for member in members.get(child.process.pid, []):
                if child.is_reported_as(member):
                    child.member = member
            if child.is_in(READY, STANDBY):
                child.was_ready = True
                child.failed_starts = 0
            if reason := self._reason_to_kill(child):
                self._log.error("killed", name=child.name, reason=reason)
                signal_child(child, signal.SIGKILL)

    def _reason_to_kill(self, child: Child) -> str:
        """Return why the child must be killed, or an empty text."""
        if not child.is_in(DEAD):
            child.dead_since = None
            is_hung = child.member is not None and child.member.hung
            return "hung: its work makes no progress" if is_hung else ""
        child.dead_since = child.dead_since or time.monotonic()
        is_frozen = time.monotonic() - child.dead_since > FROZEN_SECONDS
        return f"frozen: silent for {FROZEN_SECONDS:.0f} s" if is_frozen else ""

    def _remove_drained(self, member_ids: set[str]) -> None:
        """Remove the replicas whose members an operator drains: they are not restarted."""
        for replica in self.fleet.replicas:
            ids = {child.member.id for child in replica.children if child.member is not None}
            if ids & member_ids:
                least = 1
                if self._autoscaler and replica.role == "vision":
                    least = self._autoscaler.bounds.least
                self.fleet.remove(replica, least)

    def _scale(self, role: str, wanted: int, by: str) -> None:
        before = self.fleet.wanted[role]
        if wanted != before:
            self._log.info("scaling", role=role, replicas=wanted, before=before, by=by)
            self.fleet.wanted[role] = wanted
