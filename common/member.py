"""The runtime of a worker process: its events, its connections and its controller, as one object.

Four things have similar names:

- `Member` (this file) is what a work loop uses.
- `Membership` (`common/membership.py`) reports the process to the controller, and receives the list
  of all members.
- `control_pb2.Member` is the protobuf entry that it reports: id, role, address, state, load.
- `MembershipTable` (`services/controller/membership_table.py`) is the controller's side: the entry
  of each member, and when it reported last.

Work and data never pass the controller. They go through `Links` (`common/links.py`), which connects
to the members that the controller lists.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry

from common import events
from common.address import check_advertised, is_wildcard, own_address
from common.events import PeerDown, Received
from common.health import serve_health
from common.hello import hello
from common.links import Links
from common.logs import get_logger
from common.membership import DRAINING, READY, STANDBY, STARTING, Membership, new_member_id
from common.messages import Peer, Task
from common.process import EXIT_OK, Stop, leave
from common.progress import LOADING_SECONDS, Progress
from common.settings import ServiceSettings
from common.tracing import NO_TRACING, Tracing, open_tracing
from proto.twinlens.control.v1 import control_pb2

CONNECTABLE = (READY, DRAINING)
REPORT_LOADING_SECONDS = 2.0
MAX_EVENTS = 64
"""The events that a work loop takes at once. More would be a unit of work of unknown size."""
QUIET_SECONDS = 0.25
"""How long a draining member must hold nothing before it leaves.

Messages that were sent before its peers knew may still arrive in that time."""


@dataclass(frozen=True, slots=True)
class Drain:
    """This member must take nothing new, give back what it has not begun, and finish the rest.

    Its events end when its load is (0, 0).
    """


@dataclass(frozen=True, slots=True)
class Posted:
    """An event that another thread of the service posted to the work loop."""

    event: object


M = TypeVar("M")
Event = events.Event[M] | Drain | Posted


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a member is, and which members it connects to."""

    role: str
    fingerprint: str = ""
    """Fingerprint of the model; only members of the same model connect to each other."""
    peers: tuple[str, ...] = ()
    """Roles that the member gives work to: it connects to every ready member of them."""
    group: str = ""
    """Name of the tensor-parallel group, if the member is one of its ranks."""
    rank: int = 0
    tasks: tuple[Task, ...] = ()
    """What the model does. Gateways learn it from preprocess."""
    stages: tuple[str, ...] = ()
    """The roles that requests to the model pass through. Gateways learn them from preprocess."""

    def gives_work_to(self, other: control_pb2.Member) -> bool:
        """Whether the other is ready to take work of this member. Rank 0 speaks for its group."""
        return (
            other.role in self.peers
            and other.state in CONNECTABLE
            and other.rank == 0
            and (
                not self.fingerprint
                or not other.fingerprint
                or other.fingerprint == self.fingerprint
            )
        )

    def shares_group_with(self, other: control_pb2.Member) -> bool:
        """Whether the other is a rank other than 0 of this member's group."""
        return other.role == "llm" and other.group == self.group and other.rank > 0


class Member(Generic[M]):
    """What the work loop of a service needs to talk. `M` is the union of its inbound messages.

    Events come in through `events`, `next_event` or `take_events`. Messages go out through
    `links.send`.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        stop: Stop,
        profile: Profile,
        *,
        on_group_loss: Callable[[str], None] | None = None,
        drains: bool = False,
        standby: bool = False,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """Open the inbox and the health port, and join the controller as STARTING.

        Parameters
        ----------
        on_group_loss
            is called with the reason, on the work loop or the I/O thread, when another rank of the
            group is gone. With it, rank 0 connects to the other ranks before they are ready.
        drains
            whether the work loop handles the event Drain. Otherwise a drain stops the process.
        standby
            whether the member takes no work until it is promoted (SIGUSR1).
        registry
            further metrics for the health port.

        Raises
        ------
        BadSetting
            if `--advertise` cannot lead to where the member listens, or traces cannot be exported.
        CannotStart
            if the inbox or the health port cannot be opened.
        """
        self.id = new_member_id(settings.name or profile.role)
        self._profile = profile
        self.tracing = self._open_tracing(settings.otlp_traces_endpoint)
        self._on_group_loss = on_group_loss
        self._ranks: frozenset[str] | None = None
        """The ids of the ranks of the group; None until they have met."""
        self._inbox: deque[Event[M] | None] = deque()
        self._load: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._is_standby = standby
        self._is_draining = False
        self._is_working = False
        """Whether the work loop has begun; before that, the process loads."""
        self._last_event = time.monotonic()
        self.expected_delay = 0.0
        """Seconds until a new unit of work would begin, for the controller. The work loop updates
        it."""
        self.credits = 0
        """Units of work that the member would accept now, for the controller. The work loop updates
        it."""
        self._next_loading_report = time.monotonic() + REPORT_LOADING_SECONDS
        self.progress = Progress()
        self.progress.begin(LOADING_SECONDS)
        self.links = self._open_links(settings, stop)
        self.peer = Peer(self.id, self.links.address)
        self.membership = self._join(settings, stop, registry)
        stop.on_promotion(self._promote)
        if drains:
            stop.on_drain(self._drain)
        threading.Thread(target=self._end_on, args=(stop,), name="stop", daemon=True).start()

    def _open_tracing(self, endpoint: str) -> Tracing:
        """Return what records spans. Of a group only rank 0 records any."""
        profile = self._profile
        return NO_TRACING if profile.rank else open_tracing(endpoint, profile.role, self.id)

    def _open_links(self, settings: ServiceSettings, stop: Stop) -> Links[M]:
        check_advertised(settings.listen, settings.advertise)
        advertise = settings.advertise
        if not advertise and is_wildcard(settings.listen):
            advertise = own_address(settings.controller, stop)
        me = hello(self.id, self._profile.role, self._profile.fingerprint)
        return Links(me, settings.listen, advertise, self._on_event, self.progress)

    def _join(
        self, settings: ServiceSettings, stop: Stop, registry: CollectorRegistry | None
    ) -> Membership:
        profile = self._profile
        entry = control_pb2.Member(
            id=self.id,
            role=profile.role,
            address=self.links.address,
            fingerprint=profile.fingerprint,
            state=STARTING,
            group=profile.group,
            rank=profile.rank,
            detail="loading",
            tasks=profile.tasks,
            stages=profile.stages,
        )
        serve_health(settings.health_port, entry, self.load, self.progress.is_hung, registry)
        watches = bool(profile.peers) or (self._on_group_loss is not None and profile.rank == 0)
        return Membership(
            settings.controller,
            entry,
            self.load,
            on_members=self._on_members if watches else None,
            on_drain=stop.drain,
            is_hung=self.progress.is_hung,
            expected_delay=lambda: self.expected_delay,
            credits=lambda: self.credits,
        )

    def load(self) -> tuple[int, int]:
        """Return (in_flight, queued), which is (0, 0) while the process loads."""
        return self._load()

    def track_load(self, load: Callable[[], tuple[int, int]]) -> None:
        """Let `load` return what this function returns. Other threads call it, too."""
        self._load = load

    def meet(self, ranks: Iterable[str]) -> None:
        """Store the ids of the group's ranks. From now on the loss of any other peer is none of
        the group, whatever role the peer claims to have."""
        self._ranks = frozenset(ranks)

    def ready(self, max_model_len: int = 0) -> None:
        """Report that this member takes work, or would if it were promoted."""
        self._set_state(STANDBY if self._is_standby else READY, max_model_len=max_model_len)

    def set_missing_roles(self, roles: list[str]) -> None:
        """Report that the member waits for a peer of each of these roles, or is ready if none."""
        if roles:
            self._set_state(STARTING, f"waits for {' and '.join(roles)}")
        else:
            self.ready()

    def report_loading(self, fraction: float) -> None:
        """Report which fraction of the weights is loaded, for `twinlens status` and the log.

        This may be called for every tensor: it reports only every REPORT_LOADING_SECONDS.
        """
        self.progress.tick()
        if time.monotonic() < self._next_loading_report:
            return
        self._next_loading_report = time.monotonic() + REPORT_LOADING_SECONDS
        self._set_state(STARTING, f"loading weights, {fraction:.0%}")
        get_logger().info("loading weights", id=self.id, loaded=f"{fraction:.0%}")

    def events(self) -> Iterator[Event[M]]:
        """Yield each event as it arrives, until the process must stop or has drained."""
        while (event := self.next_event()) is not None:
            yield event

    def next_event(self) -> Event[M] | None:
        """Wait for the next event. Return None if the process must stop or has drained."""
        found = self.take_events(wait=True, most=1)
        return found[0] if found else None

    def requeue(self, events: list[Event[M]]) -> None:
        """Put back events that the work loop cannot handle yet, behind those that have arrived."""
        self._inbox.extend(events)

    def post(self, event: object) -> None:
        """Put an event of another thread of the service among the events of the work loop."""
        self._inbox.append(Posted(event))
        self.links.wake()

    def take_events(
        self, wait: bool, timeout: float | None = None, most: int = MAX_EVENTS
    ) -> list[Event[M]] | None:
        """Return the events that have arrived, at most `most`.

        With `wait`, wait for the first one, at most `timeout` seconds. Return None if the process
        must stop or has drained.
        """
        self._is_working = True
        if wait:
            self.progress.idle()
            self._wait(timeout)
        elif not self._inbox:
            self.links.wait(0.0)
        found = self._pop_events(most)
        if found is None or (wait and self._is_draining and self._has_drained()):
            return None
        self.progress.begin()
        return found

    def _wait(self, timeout: float | None) -> None:
        """Wait until there is an event, or `timeout` seconds passed, or this member has drained.

        A draining member waits for QUIET_SECONDS at least, because messages may have arrived since
        it looked last.
        """
        began = time.monotonic()
        while not self._inbox:
            waited = time.monotonic() - began
            if timeout is not None and waited >= timeout:
                return
            if self._is_draining and waited >= QUIET_SECONDS and self._has_drained():
                return
            bounds = [timeout - waited] if timeout is not None else []
            if self._is_draining:
                bounds.append(QUIET_SECONDS)
            self.links.wait(min(bounds, default=None))

    def _pop_events(self, most: int) -> list[Event[M]] | None:
        """Return the first events of the inbox, or None if the process must stop."""
        found: list[Event[M]] = []
        while self._inbox and len(found) < most:
            event = self._inbox.popleft()
            if event is None:
                return None
            # Peers that this member gives work to report their load all the time. Their messages
            # bring no work, so they do not delay the end of a drain.
            if not isinstance(event, Received) or event.role not in self._profile.peers:
                self._last_event = time.monotonic()
            found.append(event)
        return found

    def _has_drained(self) -> bool:
        return time.monotonic() - self._last_event >= QUIET_SECONDS and self._load() == (0, 0)

    def close(self) -> None:
        """Leave the controller, close all connections, and export the last spans."""
        self.membership.leave()
        self.links.close()
        self.tracing.close()

    def _set_state(
        self, state: "control_pb2.MemberState.ValueType", detail: str = "", max_model_len: int = 0
    ) -> None:
        if not self._is_draining:
            self.membership.set_state(state, detail, max_model_len)

    # Called by other threads

    def _promote(self) -> None:
        self._is_standby = False
        if self._is_working:
            self._set_state(READY)

    def _drain(self) -> None:
        if not self._is_working:
            leave(EXIT_OK)  # it still loads, so it holds nothing
        self._is_draining = True
        self._last_event = time.monotonic()
        self.membership.set_state(DRAINING)
        self.links.announce_draining()
        self._inbox.append(Drain())
        self.links.wake()

    def _end_on(self, stop: threading.Event) -> None:
        """End the events once `stop` is set."""
        stop.wait()
        if not self._is_working:
            leave(EXIT_OK)  # it still loads, which takes minutes and cannot be interrupted
        self._inbox.append(None)
        self.links.wake()

    def _on_event(self, event: Event[M]) -> None:
        if isinstance(event, PeerDown) and self._on_group_loss and self._may_be_rank(event):
            self._on_group_loss(event.reason)
        self._inbox.append(event)

    def _may_be_rank(self, event: PeerDown) -> bool:
        return event.role == "llm" if self._ranks is None else event.peer_id in self._ranks

    def _on_members(self, members: list[control_pb2.Member]) -> None:
        self.links.keep_connected(
            [(Peer(m.id, m.address), m.role) for m in members if self._connects_to(m)]
        )

    def _connects_to(self, other: control_pb2.Member) -> bool:
        """Whether to keep a connection: to those it gives work to, and from rank 0 to its ranks."""
        if self._on_group_loss and self._profile.shares_group_with(other):
            return self._profile.rank == 0
        return self._profile.gives_work_to(other)
