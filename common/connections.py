"""The protocol of the connections between processes: hello, goodbye, lease and heartbeat.

This part has no socket and no thread, and its clock is passed in. `common/links.py` owns the
sockets: it passes on what arrives, performs the `actions`, and reports the `events`.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from common.events import Event, M, PeerDown, PeerDraining, PeerUp, Received
from common.hello import is_hello
from common.logs import get_logger
from common.messages import HOPS, Beat, Draining, Goodbye, Hello, Message, Peer
from common.progress import LEASE_SECONDS, Progress
from common.wire import Buffer, WireError, decode, encode

BEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Open:
    """Connect to a peer, and send these frames first."""

    peer: Peer
    frames: list[Buffer]


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a peer."""

    peer_id: str
    frames: list[Buffer]


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection that was opened to a peer."""

    peer_id: str


Action = Open | Send | Close


@dataclass(slots=True)
class Connection:
    """One peer that is connecting or up."""

    peer: Peer
    """The address is empty if the peer connected to the inbox of this process."""
    role: str
    is_outgoing: bool
    """Whether this process opened the connection."""
    is_up: bool
    last_seen: float
    """When the last message arrived; the connection itself counts as the first one."""


class Connections(Generic[M]):
    """The peers of this process, and what their messages and their silence lead to.

    The life of a connection:

        this process                 Hello of a peer
        calls `connect`              arrives at the inbox
              |                        |           |
          Hello sent                accepted,    refused: Goodbye sent,
              |                    Hello sent    no event
              v                        |
          CONNECTING --accepted------> UP, PeerUp
              |        Hello           |
              |        of the peer     |
              +-------> DOWN <---------+
                  PeerDown, forgotten

    A connection goes down when

    - it breaks, which only the end that opened it can see,
    - nothing arrived for LEASE_SECONDS,
    - a heartbeat of the peer says that its work loop hangs,
    - the peer says Goodbye, or sends a Hello that is not acceptable, or an invalid message,
    - the peer connects again,
    - this process was frozen for longer than its lease, because the peers went on without it.

    A connection that went down is never reused. A peer that comes back has a new one, so no message
    survives from one life of a peer to the next. If this process hangs, it refuses and opens no
    connections.

    After each call the caller performs the `actions` in their order, and reports the `events`.
    `M` is the union of all messages that this process handles.
    """

    def __init__(
        self, me: Hello, progress: Progress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`progress` tells whether this process hangs; each heartbeat updates it by `watch`."""
        self.actions = deque[Action]()
        self.events: list[Event[M]] = []
        self._me = me
        self._progress = progress
        self._clock = clock
        self._connections: dict[str, Connection] = {}
        self._wanted: list[tuple[Peer, str]] = []
        self._is_draining = False
        self._last_active = clock()
        self._next_beat = self._last_active + BEAT_SECONDS
        self._log = get_logger().bind(member=me.id)

    def __contains__(self, peer_id: object) -> bool:
        """Whether the peer is connecting or up."""
        return peer_id in self._connections

    def may_send(self, peer_id: str, message: Message) -> bool:
        """Whether the peer is connecting or up, and its role handles such messages.

        A peer would take any other for an invalid message, and leave. So another member that names
        a wrong peer in a message could break the connections of this process.
        """
        connection = self._connections.get(peer_id)
        return connection is not None and isinstance(message, HOPS[self._me.role, connection.role])

    def take_events(self) -> list[Event[M]]:
        """Return what happened since the last call."""
        events = self.events
        self.events = []
        return events

    # What this process wants

    def connect(self, peer: Peer, role: str) -> None:
        """Open a connection to a peer, unless there is one."""
        if peer.id in self._connections:
            return
        self._connections[peer.id] = Connection(
            peer, role, is_outgoing=True, is_up=False, last_seen=self._clock()
        )
        self.actions.append(Open(peer, encode(self._me)))

    def keep_connected(self, wanted: list[tuple[Peer, str]]) -> None:
        """Connect to these peers, now and at every heartbeat at which one is not connected."""
        self._wanted = wanted
        self._connect_wanted()

    def announce_draining(self) -> None:
        """Send Draining to all peers that opened a connection, and to those that open one later."""
        self._is_draining = True
        for peer_id, connection in self._connections.items():
            if not connection.is_outgoing:
                self.actions.append(Send(peer_id, encode(Draining())))

    # What happens to it

    def on_inbox_frames(self, peer_id: str, frames: list[Buffer]) -> None:
        """Handle a message that arrived at the inbox."""
        if peer_id not in self._connections or is_hello(frames):
            self._accept(peer_id, frames)
        else:
            self.on_frames(peer_id, frames)

    def on_frames(self, peer_id: str, frames: list[Buffer]) -> None:
        """Handle a message of a peer that is connecting or up."""
        connection = self._connections[peer_id]
        try:
            message = decode(frames, HOPS[connection.role, self._me.role])
        except WireError as e:
            self._log.error(
                "dropped a peer that sent an invalid message", peer=peer_id, reason=str(e)
            )
            self._end(connection, f"it sent an invalid message: {e}")
            return
        connection.last_seen = self._clock()
        match message:
            case Beat(hung_seconds=seconds):
                if seconds:
                    self._end(connection, hung_reason(seconds))
            case Goodbye(reason=reason):
                self._end(connection, reason)
            case Draining():
                self.events.append(PeerDraining(peer_id, connection.role))
            case Hello() if connection.is_outgoing:
                self._on_answer(connection, message)
            case _:
                self.events.append(Received(peer_id, connection.role, message))

    def on_broken(self, peer_id: str, reason: str) -> None:
        """Handle the end of a connection that this process opened, or could not open."""
        if connection := self._connections.get(peer_id):
            self._end(connection, reason)

    # What time does to it

    def seconds_until_heartbeat(self) -> float:
        """Return the seconds until the next heartbeat; 0 if it is due."""
        return max(0.0, self._next_beat - self._clock())

    def heartbeat(self) -> None:
        """Send a heartbeat to every peer, end what has expired, and connect to wanted peers."""
        now = self._clock()
        self._progress.watch()
        # After a pause of this process, heartbeats of the others still lie unread. So leases are
        # judged at the next heartbeat only.
        self._send_heartbeats(judge=now - self._next_beat < BEAT_SECONDS)
        self._connect_wanted()
        self._next_beat = now + BEAT_SECONDS

    def mark_active(self) -> None:
        """Note that this process reads its messages."""
        self._last_active = self._clock()

    def reset_if_frozen(self) -> bool:
        """End all connections if this process was frozen for longer than its lease.

        Its peers went on without it, and what they sent before is stale. Returns whether it was.
        """
        now = self._clock()
        if now - self._last_active <= LEASE_SECONDS:
            return False
        self._last_active = now
        self._log.warning("was frozen for longer than its lease, so it drops all connections")
        for connection in list(self._connections.values()):
            self._end(connection, "this process was frozen beyond its lease")
        return True

    def _accept(self, peer_id: str, frames: list[Buffer]) -> None:
        """Handle the first message of a connection to the inbox, which must be a fitting Hello."""
        try:
            hello = decode(frames, Hello)
        except WireError as e:
            self._refuse(peer_id, f"say Hello first: your lease ended or never began ({e})")
            return
        reason = self._objection_to(hello)
        if not reason and hello.id != peer_id:
            reason = "the id in Hello is not the connection's"
        if reason:
            self._refuse(peer_id, reason)
            return
        if old := self._connections.get(peer_id):
            self._end(old, "it connected again")
        self._connections[peer_id] = Connection(
            Peer(peer_id, ""), hello.role, is_outgoing=False, is_up=True, last_seen=self._clock()
        )
        self.actions.append(Send(peer_id, encode(self._me)))
        if self._is_draining:
            self.actions.append(Send(peer_id, encode(Draining())))
        self.events.append(PeerUp(peer_id, hello.role))

    def _refuse(self, peer_id: str, reason: str) -> None:
        self._log.warning("refused a connection", peer=peer_id, reason=reason)
        self.actions.append(Send(peer_id, encode(Goodbye(reason=reason))))

    def _on_answer(self, connection: Connection, hello: Hello) -> None:
        """Handle the Hello by which a peer answers the one of this process."""
        peer = connection.peer
        reason = self._objection_to(hello)
        if reason or hello.id != peer.id:
            self._log.error(
                "left a peer",
                peer=peer.id,
                reason=reason or f"another process answers at its address: {hello.id}",
            )
            self._end(connection, reason or "another process has its address")
        elif not connection.is_up:
            connection.is_up = True
            self.events.append(PeerUp(peer.id, connection.role, peer.address))

    def _objection_to(self, hello: Hello) -> str:
        """Return why this process cannot talk to the sender of a Hello; empty if it can."""
        me = self._me
        if self._progress.is_hung():
            return hung_reason(self._progress.age())
        if hello.protocol_version != me.protocol_version:
            return (
                f"protocol version {hello.protocol_version} against {me.protocol_version}: "
                "run services of one release"
            )
        if (hello.role, me.role) not in HOPS:
            return f"a {hello.role} has nothing to say to a {me.role}"
        if hello.fingerprint and me.fingerprint and hello.fingerprint != me.fingerprint:
            return (
                f"model fingerprint {hello.fingerprint} against {me.fingerprint}: "
                "both must serve the same model directory"
            )
        return ""

    def _connect_wanted(self) -> None:
        if not self._progress.is_hung():
            for peer, role in self._wanted:
                self.connect(peer, role)

    def _send_heartbeats(self, judge: bool) -> None:
        """Send a heartbeat to every peer; with `judge`, end those whose lease has ended instead."""
        now = self._clock()
        frames = encode(
            Beat(hung_seconds=self._progress.age() if self._progress.is_hung() else 0.0)
        )
        for peer_id, connection in list(self._connections.items()):
            if judge and now - connection.last_seen > LEASE_SECONDS:
                self._end(connection, f"no sign of life for {LEASE_SECONDS:.0f} s")
            else:
                self.actions.append(Send(peer_id, frames))

    def _end(self, connection: Connection, reason: str) -> None:
        peer_id = connection.peer.id
        del self._connections[peer_id]
        if connection.is_outgoing:
            self.actions.append(Close(peer_id))
        self.events.append(PeerDown(peer_id, connection.role, reason))


def hung_reason(seconds: float) -> str:
    """Return what is said of a process whose work loop has been stuck for that many seconds."""
    return f"hung: its work loop made no progress for {seconds:.0f} s"
