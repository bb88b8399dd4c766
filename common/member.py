"""A worker process as a member: its inbox of events, its connections, its place in the control plane."""

import queue
import threading
import time
from collections.abc import Callable, Iterator

from common.links import Down, Event, Links, hello
from common.logs import get_logger
from common.membership import DRAINING, READY, STARTING, Membership, new_member_id
from common.messages import Peer
from common.settings import Service
from proto.twinlens.control.v1 import control_pb2

CONNECTABLE = (READY, DRAINING)
PROGRESS_SECONDS = 2.0


class Member:
    """What the work loop of a service needs to talk: events come in through `events` and `waiting_events`, messages go out by `links.send`."""

    def __init__(
        self,
        settings: Service,
        role: str,
        stop: threading.Event,
        load: Callable[[], tuple[int, int]],
        fingerprint: str = "",
        peers: tuple[str, ...] = (),
        group: str = "",
        rank: int = 0,
        on_group_loss: Callable[[str], None] | None = None,
    ) -> None:
        """Connects to every ready member of the roles in `peers` that serves the same model, and from rank 0 to the other ranks
        of the group. `load` gives (in_flight, queued). `on_group_loss` hears on the I/O thread that another rank is gone."""
        self.id = new_member_id(settings.name or role)
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._fingerprint, self._peers, self._group, self._rank = fingerprint, peers, group, rank
        self._on_group_loss = on_group_loss
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        self.links = Links(hello(self.id, role, fingerprint), settings.listen, settings.advertise, self._hear)
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
        watches = bool(peers) or (on_group_loss is not None and rank == 0)
        self.membership = Membership(settings.controller, entry, load, self._on_members if watches else None)
        threading.Thread(target=self._pass_on, args=(stop,), name="stop", daemon=True).start()

    def ready(self, max_model_len: int = 0) -> None:
        self.membership.set_state(READY, max_model_len=max_model_len)

    def waits_for(self, roles: list[str]) -> None:
        """Ready once there is one of each."""
        if roles:
            self.membership.set_state(STARTING, f"waits for {' and '.join(roles)}")
        else:
            self.ready()

    def loading(self, progress: float) -> None:
        """Shown by `twinlens status` and logged while weights load, but not for every tensor."""
        if time.monotonic() < self._next_progress:
            return
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        self.membership.set_state(STARTING, f"loading weights, {progress:.0%}")
        get_logger().info("loading weights", id=self.id, progress=f"{progress:.0%}")

    def events(self) -> Iterator[Event]:
        """Each event as it comes, until the process is to stop."""
        while (event := self.next_event()) is not None:
            yield event

    def next_event(self) -> Event | None:
        """The next event, waited for; None when the process is to stop."""
        return self._inbox.get()

    def put_back(self, events: list[Event]) -> None:
        """Events that were taken before their time come again, after those that came since."""
        for event in events:
            self._inbox.put(event)

    def waiting_events(self, wait: bool, timeout: float | None = None) -> list[Event] | None:
        """The events that are there, the first one waited for (at most `timeout` seconds) where `wait`; None when the process
        is to stop."""
        found: list[Event] = []
        try:
            while True:
                event = self._inbox.get(block=wait and not found, timeout=timeout)
                if event is None:
                    return None
                found.append(event)
        except queue.Empty:
            return found

    def close(self) -> None:
        self.membership.leave()
        self.links.close()

    def _pass_on(self, stop: threading.Event) -> None:
        stop.wait()
        self._inbox.put(None)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Down) and event.role == "llm" and self._on_group_loss:
            self._on_group_loss(event.reason)
        self._inbox.put(event)

    def _on_members(self, members: list[control_pb2.Member]) -> None:
        self.links.keep_connected([(Peer(m.id, m.address), m.role) for m in members if self._wants(m)])

    def _wants(self, member: control_pb2.Member) -> bool:
        """Rank 0 speaks for its group, and to its ranks before they are ready."""
        if self._on_group_loss and member.role == "llm" and member.group == self._group and member.rank > 0:
            return self._rank == 0
        fits = not self._fingerprint or not member.fingerprint or member.fingerprint == self._fingerprint
        return member.role in self._peers and member.state in CONNECTABLE and member.rank == 0 and fits
