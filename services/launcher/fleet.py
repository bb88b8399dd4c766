"""How many replicas of each role are to run, which of them are, and what brings the two
together."""

import signal
import time
from dataclasses import dataclass
from typing import Protocol

from common.logs import get_logger
from common.membership import DRAINING, READY, STANDBY
from services.launcher.autoscale import Sample
from services.launcher.child import Child, signal_child

STOP_SECONDS = 5.0
"""For a replica that did not drain in time to end its work with an error."""


class Make(Protocol):
    def __call__(self, role: str, number: int) -> list[Child]:
        """The children of one replica: one, or the ranks of a language group."""
        ...


@dataclass(slots=True)
class Replica:
    """What is scaled as one. The first child holds its work, and is the one that drains."""

    role: str
    number: int
    children: list[Child]
    retired: float | None = None
    """Since when it is to drain and not to come back."""
    stopped: float | None = None

    @property
    def first(self) -> Child:
        return self.children[0]

    @property
    def has_ended(self) -> bool:
        return all(child.process is None for child in self.children)

    @property
    def work(self) -> int:
        """Units that it holds; one that is not ready holds none that counts."""
        member = self.first.member
        return (
            member.in_flight + member.queued if member and self.first.is_in(READY, DRAINING) else -1
        )


class Fleet:
    """The replicas, and `wanted`: how many of each role take work. Changed by one thread alone."""

    def __init__(
        self, wanted: dict[str, int], num_standbys: int, make: Make, drain_seconds: float
    ) -> None:
        self.wanted = wanted
        self.num_standbys = num_standbys
        self._make = make
        self._drain_seconds = drain_seconds
        self.replicas: list[Replica] = []
        self._log = get_logger()
        self.reconcile()

    @property
    def children(self) -> list[Child]:
        return [child for replica in self.replicas for child in replica.children]

    def kept(self, role: str) -> list[Replica]:
        return [
            replica for replica in self.replicas if replica.role == role and replica.retired is None
        ]

    def active(self, role: str) -> list[Replica]:
        return [replica for replica in self.kept(role) if not replica.first.is_standby]

    def replica_of(self, child: Child) -> Replica:
        return next(replica for replica in self.replicas if child in replica.children)

    def reconcile(self) -> None:
        """Takes the steps that can be taken now; the children that it adds are started by the
        launcher."""
        self.replicas = [
            replica for replica in self.replicas if replica.retired is None or not replica.has_ended
        ]
        self._replace_dead()
        for role, wanted in self.wanted.items():
            self._add(role, wanted - len(self.active(role)))
            for replica in by_loss(self.active(role))[: max(0, len(self.active(role)) - wanted)]:
                self.retire(replica)
        self._keep_standbys()
        for replica in self.replicas:
            self._promote(replica)
            self._end(replica)

    def sample_vision(self) -> Sample:
        """The vision pool as the control plane told it last: the least that a replica has in hand,
        and what waits before the pool."""
        members = [
            r.first.member
            for r in self.active("vision")
            if r.first.member is not None and r.first.is_in(READY)
        ]
        waiting = sum(
            r.first.member.expected_delay
            for r in self.replicas
            if r.role == "preprocess" and r.first.member is not None
        )
        return Sample(
            now=time.monotonic(),
            delay=waiting + min((member.expected_delay for member in members), default=0.0),
            busy=sum(member.in_flight > 0 for member in members),
            ready=len(members),
            wanted=self.wanted["vision"],
        )

    def retire(self, replica: Replica) -> None:
        """It drains, and does not come back."""
        if replica.retired is None:
            replica.retired = time.monotonic()
            self._log.info("draining", name=replica.first.name)
            signal_child(replica.first, signal.SIGTERM)

    def take_out(self, replica: Replica, least: int = 1) -> None:
        """One fewer is wanted from now on, and it is this one; but at least so many stay wanted,
        and another comes in its place."""
        if not replica.first.is_standby and replica.retired is None and replica.role in self.wanted:
            self.wanted[replica.role] = max(least, self.wanted[replica.role] - 1)
        self.retire(replica)

    def can_spare(self, replica: Replica) -> bool:
        """Whether another one of the role takes work."""
        return any(
            other.first.is_in(READY) for other in self.active(replica.role) if other is not replica
        )

    def give_up(self, replica: Replica) -> None:
        """One that cannot be started is wanted no longer."""
        if replica.first.is_standby:
            self.num_standbys -= 1
        else:
            self.wanted[replica.role] -= 1
        replica.retired = time.monotonic()

    def next_deadline(self) -> float | None:
        """When the patience with a retired replica ends."""
        now = time.monotonic()
        return min(
            (
                m
                for replica in self.replicas
                if (m := self._ends_at(replica)) is not None and m > now
            ),
            default=None,
        )

    def _ends_at(self, replica: Replica) -> float | None:
        if replica.retired is None:
            return None
        return (
            replica.retired + self._drain_seconds
            if replica.stopped is None
            else replica.stopped + STOP_SECONDS
        )

    def _add(self, role: str, count: int) -> None:
        """Standbys first, loaded ones before those that load."""
        standbys = sorted(
            (r for r in self.kept(role) if r.first.is_standby),
            key=lambda r: not r.first.is_in(STANDBY),
        )
        for standby in standbys[: max(0, count)]:
            standby.first.is_standby = False
        for _ in range(count - len(standbys)):
            self._new(role)

    def _new(self, role: str) -> Replica:
        taken = {replica.number for replica in self.replicas if replica.role == role}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        replica = Replica(role, number, self._make(role, number))
        self.replicas.append(replica)
        return replica

    def _replace_dead(self) -> None:
        """A loaded standby takes the place of a replica that died, which becomes the standby."""
        for role in self.wanted:
            loaded = [r for r in self.kept(role) if r.first.is_standby and r.first.is_in(STANDBY)]
            dead = [
                r for r in self.active(role) if r.first.process is None and r.first.num_starts > 0
            ]
            for standby, lost in zip(loaded, dead, strict=False):
                standby.first.is_standby = False
                lost.first.is_standby = True

    def _keep_standbys(self) -> None:
        standbys = [replica for replica in self.kept("vision") if replica.first.is_standby]
        for _ in range(self.num_standbys - len(standbys)):
            self._new("vision").first.is_standby = True
        for replica in by_loss(standbys)[: max(0, len(standbys) - self.num_standbys)]:
            self.retire(replica)

    def _promote(self, replica: Replica) -> None:
        if (
            replica.first.is_in(STANDBY)
            and not replica.first.is_standby
            and replica.retired is None
        ):
            signal_child(replica.first, signal.SIGUSR1)

    def _end(self, replica: Replica) -> None:
        """A retired replica whose first child is gone has drained; one that takes too long is
        stopped, then killed."""
        if replica.retired is None:
            return
        overdue = (ends_at := self._ends_at(replica)) is not None and time.monotonic() >= ends_at
        if replica.first.process is None or (overdue and replica.stopped is not None):
            for child in replica.children:
                signal_child(child, signal.SIGKILL)
        elif overdue:
            replica.stopped = time.monotonic()
            self._log.warning("did not drain in time: stopped", name=replica.first.name)
            signal_child(replica.first, signal.SIGINT)


def by_loss(replicas: list[Replica]) -> list[Replica]:
    """Those first that are missed least: not ready, then by the work they hold, the youngest
    first."""
    return sorted(replicas, key=lambda replica: (replica.work, -replica.number))
