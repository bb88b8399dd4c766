"""The replicas of each role: how many are wanted, which ones run, and the steps between the two."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from common.logs import get_logger
from common.membership import DRAINING, READY, STANDBY
from services.launcher.autoscale import Sample
from services.launcher.child import Child, signal_child

STOP_SECONDS = 5.0
"""How long a replica that did not drain in time has to fail its work and exit."""

MakeChildren = Callable[[str, int], list[Child]]
"""Makes the children of replica `number` of a role: one child, or the ranks of a language group."""


@dataclass(slots=True)
class ManagedReplica:
    """One unit of scaling: a process, or a language group with a process for each rank.

    The first child is the leader: it holds the work, and it is the one that drains.
    """

    role: str
    number: int
    children: list[Child]
    retired_at: float | None = None
    """Since when it must drain and not be restarted."""
    stopped_at: float | None = None
    """When it was told to stop because it did not drain in time."""

    @property
    def leader(self) -> Child:
        return self.children[0]

    @property
    def is_retired(self) -> bool:
        return self.retired_at is not None

    @property
    def has_exited(self) -> bool:
        return all(child.process is None for child in self.children)

    @property
    def load(self) -> int:
        """The number of requests or images that it holds; -1 if it does not serve."""
        member = self.leader.member
        if member is None or not self.leader.is_in(READY, DRAINING):
            return -1
        return member.in_flight + member.queued


class Fleet:
    """All replicas, and `wanted`: how many of each role should serve. One thread uses it.

    It signals children and makes new ones; the supervisor starts them and notices their exits.
    """

    def __init__(
        self,
        wanted: dict[str, int],
        num_standbys: int,
        make_children: MakeChildren,
        drain_seconds: float,
    ) -> None:
        self.wanted = wanted
        self.num_standbys = num_standbys
        self._make_children = make_children
        self._drain_seconds = drain_seconds
        self.replicas: list[ManagedReplica] = []
        self._log = get_logger()
        self.reconcile()

    @property
    def children(self) -> list[Child]:
        return [child for replica in self.replicas for child in replica.children]

    def kept(self, role: str) -> list[ManagedReplica]:
        """Return the role's replicas that are not retired, standbys included."""
        return [r for r in self.replicas if r.role == role and not r.is_retired]

    def active(self, role: str) -> list[ManagedReplica]:
        """Return the role's replicas that serve, or will once they have started."""
        return [replica for replica in self.kept(role) if not replica.leader.is_standby]

    def replica_of(self, child: Child) -> ManagedReplica:
        return next(replica for replica in self.replicas if child in replica.children)

    def reconcile(self) -> None:
        """Take every step towards the wanted numbers that is possible now."""
        self.replicas = [r for r in self.replicas if not (r.is_retired and r.has_exited)]
        self._replace_dead_by_standbys()
        for role, wanted in self.wanted.items():
            self._grow(role, wanted - len(self.active(role)))
            self._shrink(self.active(role), wanted)
        self._reconcile_standbys()
        for replica in self.replicas:
            self._promote(replica)
            self._finish_retirement(replica)

    def sample_vision(self) -> Sample:
        """Return the vision pool's state by the controller's latest reports.

        The delay is the shortest queue of a ready replica plus what waits in preprocess.
        """
        members = [
            r.leader.member
            for r in self.active("vision")
            if r.leader.member is not None and r.leader.is_in(READY)
        ]
        waiting = sum(
            r.leader.member.expected_delay
            for r in self.replicas
            if r.role == "preprocess" and r.leader.member is not None
        )
        return Sample(
            now=time.monotonic(),
            delay=waiting + min((member.expected_delay for member in members), default=0.0),
            busy=sum(member.in_flight > 0 for member in members),
            ready=len(members),
            wanted=self.wanted["vision"],
        )

    def retire(self, replica: ManagedReplica) -> None:
        """Begin to drain the replica, which is not restarted afterwards."""
        if not replica.is_retired:
            replica.retired_at = time.monotonic()
            self._log.info("draining", name=replica.leader.name)
            signal_child(replica.leader, signal.SIGTERM)

    def remove(self, replica: ManagedReplica, least: int = 1) -> None:
        """Retire this replica and want one fewer of its role, but never fewer than `least`.

        If that bound holds the number up, another replica replaces this one.
        """
        counts = not replica.leader.is_standby and not replica.is_retired
        if counts and replica.role in self.wanted:
            self.wanted[replica.role] = max(least, self.wanted[replica.role] - 1)
        self.retire(replica)

    def can_spare(self, replica: ManagedReplica) -> bool:
        """Whether another replica of the role is ready."""
        others = [other for other in self.active(replica.role) if other is not replica]
        return any(other.leader.is_in(READY) for other in others)

    def abandon(self, replica: ManagedReplica) -> None:
        """Stop restarting a replica that cannot start, and want one fewer."""
        if replica.leader.is_standby:
            self.num_standbys -= 1
        else:
            self.wanted[replica.role] -= 1
        replica.retired_at = time.monotonic()

    def next_deadline(self) -> float | None:
        """Return when the next retired replica runs out of time, or None if none will."""
        now = time.monotonic()
        deadlines = [self._deadline(r) for r in self.replicas if r.is_retired]
        return min((deadline for deadline in deadlines if deadline > now), default=None)

    def _deadline(self, replica: ManagedReplica) -> float:
        """Return when a retired replica must have drained or, if it was stopped, exited."""
        assert replica.retired_at is not None
        if replica.stopped_at is None:
            return replica.retired_at + self._drain_seconds
        return replica.stopped_at + STOP_SECONDS

    def _grow(self, role: str, count: int) -> None:
        """Add replicas: first standbys, loaded ones before loading ones, then new ones."""
        standbys = sorted(
            (r for r in self.kept(role) if r.leader.is_standby),
            key=lambda r: not r.leader.is_in(STANDBY),
        )
        for standby in standbys[: max(0, count)]:
            standby.leader.is_standby = False
        for _ in range(count - len(standbys)):
            self._add_replica(role)

    def _add_replica(self, role: str) -> ManagedReplica:
        taken = {replica.number for replica in self.replicas if replica.role == role}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        replica = ManagedReplica(role, number, self._make_children(role, number))
        self.replicas.append(replica)
        return replica

    def _shrink(self, replicas: list[ManagedReplica], wanted: int) -> None:
        """Retire what is more than `wanted`: not ready ones, then by least load, youngest first."""
        ordered = sorted(replicas, key=lambda replica: (replica.load, -replica.number))
        for replica in ordered[: max(0, len(replicas) - wanted)]:
            self.retire(replica)

    def _replace_dead_by_standbys(self) -> None:
        """Swap each dead replica with a loaded standby; the dead one restarts as a standby."""
        for role in self.wanted:
            loaded = [r for r in self.kept(role) if r.leader.is_standby and r.leader.is_in(STANDBY)]
            dead = [
                r for r in self.active(role) if r.leader.process is None and r.leader.num_starts > 0
            ]
            for standby, lost in zip(loaded, dead, strict=False):
                standby.leader.is_standby = False
                lost.leader.is_standby = True

    def _reconcile_standbys(self) -> None:
        standbys = [replica for replica in self.kept("vision") if replica.leader.is_standby]
        for _ in range(self.num_standbys - len(standbys)):
            self._add_replica("vision").leader.is_standby = True
        self._shrink(standbys, self.num_standbys)

    def _promote(self, replica: ManagedReplica) -> None:
        """Put a process to work that was started as a standby, unless it still should be one."""
        leader = replica.leader
        if leader.is_in(STANDBY) and not leader.is_standby and not replica.is_retired:
            signal_child(leader, signal.SIGUSR1)

    def _finish_retirement(self, replica: ManagedReplica) -> None:
        """Kill what is left of a drained replica; stop, then kill one that takes too long."""
        if not replica.is_retired:
            return
        is_overdue = time.monotonic() >= self._deadline(replica)
        if replica.leader.process is None or (is_overdue and replica.stopped_at is not None):
            for child in replica.children:
                signal_child(child, signal.SIGKILL)
        elif is_overdue:
            replica.stopped_at = time.monotonic()
            self._log.warning("stopping: it did not drain in time", name=replica.leader.name)
            signal_child(replica.leader, signal.SIGINT)
