"""A worker process as a member: its inbox of events, its connections, its place in the control
plane."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
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
from common.messages import Peer
from common.process import Stop, leave
from common.progress import LOADING_SECONDS, Progress
from common.settings import ServiceSettings
from proto.twinlens.control.v1 import control_pb2

CONNECTABLE = (READY, DRAINING)
PROGRESS_SECONDS = 2.0
QUIET_SECONDS = 0.25
"""For how long a draining member must hold nothing before it leaves: what was sent to it before its
peers knew may still arrive."""


@dataclass(frozen=True, slots=True)
class Drain:
    """This member is to take nothing new: give back what is not begun, finish the rest. Its events
    end when its load is (0, 0)."""


@dataclass(frozen=True, slots=True)
class Posted:
    """An event of the service's own, posted to its work loop by another of its threads."""

    event: object


M = TypeVar("M")
Event = events.Event[M] | Drain | Posted


class Member(Generic[M]):
    """What the work loop of a service needs to talk: events come in through `events` and
    `take_events`, messages go out by `links.send`."""

    def __init__(
        self,
        settings: ServiceSettings,
        role: str,
        stop: Stop,
        fingerprint: str = "",
        peers: tuple[str, ...] = (),
        group: str = "",
        rank: int = 0,
        on_group_loss: Callable[[str], None] | None = None,
        drains: bool = False,
        standby: bool = False,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """Connects to every ready member of the roles in `peers` that serves the same model, and
        from rank 0 to the other ranks of the group. `load` gives (in_flight, queued).
        `on_group_loss` hears, on either thread, that another rank is gone. One that `drains`
        hears of it by the event Drain; any other stops. A `standby` takes no work until it is
        promoted (SIGUSR1). The health port shows the metrics of the `registry`, too."""
        self.id = new_member_id(settings.name or role)
        self._inbox: deque[Event[M] | None] = deque()
        self._fingerprint = fingerprint
        self._peers = peers
        self._group = group
        self._rank = rank
        self._on_group_loss = on_group_loss
        self._load: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._is_standby = standby
        self._draining = self._works = False
        self._last_event = time.monotonic()
        self.expected_delay = 0.0
        """Seconds until a new unit would be begun, for the controller; the work loop keeps it up to
        date."""
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        check_advertised(settings.listen, settings.advertise)
        advertise = settings.advertise or (
            own_address(settings.controller, stop) if is_wildcard(settings.listen) else ""
        )
        self.progress = Progress()
        self.progress.begin(LOADING_SECONDS)
        self.links = Links(
            hello(self.id, role, fingerprint), settings.listen, advertise, self._hear, self.progress
        )
        self.peer = Peer(self.id, self.links.address)
        entry = control_pb2.Member(
            id=self.id,
            role=role,
            address=self.links.address,
            fingerprint=fingerprint,
            state=STARTING,
            group=group,
            rank=rank,
            detail="loading",
        )
        serve_health(settings.health_port, entry, self.load, self.progress.is_hung, registry)
        watches = bool(peers) or (on_group_loss is not None and rank == 0)
        self.membership = Membership(
            settings.controller,
            entry,
            self.load,
            self._on_members if watches else None,
            stop.drain,
            is_hung=self.progress.is_hung,
            expected_delay=lambda: self.expected_delay,
        )
        stop.on_promotion(self._promote)
        if drains:
            stop.on_drain(self._drain)
        threading.Thread(target=self._pass_on, args=(stop,), name="stop", daemon=True).start()

    def load(self) -> tuple[int, int]:
        """Return (in_flight, queued); (0, 0) while the process loads."""
        return self._load()

    def track_load(self, load: Callable[[], tuple[int, int]]) -> None:
        """From now on `load` returns (in_flight, queued). Other threads call it, too."""
        self._load = load

    def ready(self, max_model_len: int = 0) -> None:
        self._set_state(STANDBY if self._is_standby else READY, max_model_len=max_model_len)

    def set_missing_roles(self, roles: list[str]) -> None:
        """Ready once there is one of each."""
        if roles:
            self._set_state(STARTING, f"waits for {' and '.join(roles)}")
        else:
            self.ready()

    def loading(self, progress: float) -> None:
        """Shown by `twinlens status` and logged while weights load, but not for every tensor."""
        self.progress.tick()
        if time.monotonic() < self._next_progress:
            return
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        self._set_state(STARTING, f"loading weights, {progress:.0%}")
        get_logger().info("loading weights", id=self.id, progress=f"{progress:.0%}")

    def events(self) -> Iterator[Event[M]]:
        """Each event as it comes, until the process is to stop, or has drained."""
        while (event := self.next_event()) is not None:
            yield event

    def next_event(self) -> Event[M] | None:
        """The next event, waited for; None when the process is to stop, or has drained."""
        found = self.take_events(wait=True, most=1)
        return found[0] if found else None

    def requeue(self, events: list[Event[M]]) -> None:
        """Events that were taken before their time come again, after those that came since."""
        self._inbox.extend(events)

    def post(self, event: object) -> None:
        """Put an event of another thread of the service among the events of the work loop."""
        self._inbox.append(Posted(event))
        self.links.wake()

    def take_events(
        self, wait: bool, timeout: float | None = None, most: int = sys.maxsize
    ) -> list[Event[M]] | None:
        """The events that are there, the first one waited for (at most `timeout` seconds) where
        `wait`; None when the process is to stop, or has drained."""
        self._works = True
        if wait:
            self.progress.idle()
            self._wait(timeout)
        elif not self._inbox:
            self.links.wait(0.0)
        found = self._take(most)
        if found is None or (wait and self._draining and self._has_drained()):
            return None
        self.progress.begin()
        return found

    def _wait(self, timeout: float | None) -> None:
        """Until there is an event, or for so many seconds, or until this member has drained: not
        before it waited for a while for what came since it looked last."""
        began = time.monotonic()
        while not self._inbox:
            waited = time.monotonic() - began
            if timeout is not None and waited >= timeout:
                return
            if self._draining and waited >= QUIET_SECONDS and self._has_drained():
                return
            bounds = [timeout - waited] if timeout is not None else []
            if self._draining:
                bounds.append(QUIET_SECONDS)
            self.links.wait(min(bounds, default=None))

    def _take(self, most: int) -> list[Event[M]] | None:
        found: list[Event[M]] = []
        while self._inbox and len(found) < most:
            event = self._inbox.popleft()
            if event is None:
                return None
            # Those that it gives work to tell it of their load as long as they live.
            if not isinstance(event, Received) or event.role not in self._peers:
                self._last_event = time.monotonic()
            found.append(event)
        return found

    def _has_drained(self) -> bool:
        return time.monotonic() - self._last_event >= QUIET_SECONDS and self._load() == (0, 0)

    def close(self) -> None:
        self.membership.leave()
        self.links.close()

    def _set_state(
        self, state: "control_pb2.MemberState.ValueType", detail: str = "", max_model_len: int = 0
    ) -> None:
        if not self._draining:
            self.membership.set_state(state, detail, max_model_len)

    def _promote(self) -> None:
        self._is_standby = False
        if self._works:
            self._set_state(READY)

    def _drain(self) -> None:
        if not self._works:
            leave(0)  # it loads, and holds nothing
        self._draining = True
        self._last_event = time.monotonic()
        self.membership.set_state(DRAINING)
        self.links.announce_draining()
        self._inbox.append(Drain())
        self.links.wake()

    def _pass_on(self, stop: threading.Event) -> None:
        stop.wait()
        if not self._works:
            leave(0)  # it loads, which takes minutes and cannot be interrupted otherwise
        self._inbox.append(None)
        self.links.wake()

    def _hear(self, event: Event[M]) -> None:
        if isinstance(event, PeerDown) and event.role == "llm" and self._on_group_loss:
            self._on_group_loss(event.reason)
        self._inbox.append(event)

    def _on_members(self, members: list[control_pb2.Member]) -> None:
        self.links.keep_connected(
            [(Peer(m.id, m.address), m.role) for m in members if self._wants(m)]
        )

    def _wants(self, member: control_pb2.Member) -> bool:
        """Rank 0 speaks for its group, and to its ranks before they are ready."""
        if (
            self._on_group_loss
            and member.role == "llm"
            and member.group == self._group
            and member.rank > 0
        ):
            return self._rank == 0
        fits = (
            not self._fingerprint
            or not member.fingerprint
            or member.fingerprint == self._fingerprint
        )
        return (
            member.role in self._peers and member.state in CONNECTABLE and member.rank == 0 and fits
        )
