"""The protocol of the connections between processes: hello, goodbye, lease and heartbeat.

This part has no socket and no thread, and its clock is passed in. `common/links.py` owns the
sockets: it passes on what arrives, performs the `actions`, and reports the `events`.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from common.events import Event, M, PeerDown, PeerDraining, PeerUp, Received
from common.hops import CONNECTS, max_tensor_bytes
from common.logs import get_logger
from common.messages import HOPS, Beat, Draining, Goodbye, Hello, Message, Peer
from common.progress import LEASE_SECONDS, Progress
from common.wire import Buffer, WireError, decode, encode

BEAT_SECONDS = 1.0
MAX_INBOX_PEERS = 512
"""Peers at the inbox."""
MAX_OTHER_PEERS = 256
"""Peers that this process connects to although the controller did not name them."""

Stranger = Any
"""A connection to the inbox whose Hello was not accepted yet; any object stands for it."""


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
    """Close the connection to a peer, whichever end opened it."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Admit:
    """The stranger is the peer of this id from now on."""

    stranger: Stranger
    peer_id: str


@dataclass(frozen=True, slots=True)
class Allow:
    """Accept messages of a peer with this number of bytes in tensors."""

    peer_id: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Read nothing more of a stranger until it is admitted."""

    stranger: Stranger


@dataclass(frozen=True, slots=True)
class Refuse:
    """Send a stranger these frames, and close its connection."""

    stranger: Stranger
    frames: list[Buffer]


Action = Open | Send | Close | Admit | Allow | Hold | Refuse


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
              |                    Hello sent    connection closed, no event
              v                        |
          CONNECTING --accepted------> UP, PeerUp
              |        Hello           |
              |        of the peer     |
              +-------> DOWN <---------+
                  PeerDown, forgotten

    A connection goes down when

    - it breaks,
    - nothing arrived for LEASE_SECONDS,
    - a heartbeat of the peer says that its work loop hangs,
    - the peer says Goodbye, or sends a Hello that is not acceptable, or an invalid message,
    - it came to the inbox, and this process must connect to the member of its id,
    - this process was frozen for longer than its lease, because the peers went on without it.

    A connection that went down is never reused. A peer that comes back has a new one, so no message
    survives from one life of a peer to the next. If this process hangs, it refuses and opens no
    connections.

    An id is taken while a peer has it, because ids are no secrets: the controller names them to all
    members. A stranger that claims a taken id waits. A member that comes back is admitted as soon
    as its former connection is down. Nobody can end the connection of another one.

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
        self._wanted_ids: set[str] = set()
        self._waiting: dict[str, tuple[Stranger, Hello]] = {}
        """Strangers that claim the id of a peer, by that id."""
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
        if existing := self._connections.get(peer.id):
            if existing.is_outgoing:
                return
            self._refuse_waiting(peer.id, OWN_CONNECTION)
            self._log.warning("refused a connection", peer=peer.id, reason=OWN_CONNECTION)
            self._end(existing, OWN_CONNECTION)
        if self._has_too_many(peer):
            self._log.warning("did not connect to a peer", peer=peer.id, reason=TOO_MANY)
            self.events.append(PeerDown(peer.id, role, TOO_MANY))
            return
        self._connections[peer.id] = Connection(
            peer, role, is_outgoing=True, is_up=False, last_seen=self._clock()
        )
        self.actions.append(Open(peer, encode(self._me)))

    def _has_too_many(self, peer: Peer) -> bool:
        """Whether too many peers are connected because messages named them."""
        num_outgoing = sum(each.is_outgoing for each in self._connections.values())
        return num_outgoing >= MAX_OTHER_PEERS and peer.id not in self._wanted_ids

    def keep_connected(self, wanted: list[tuple[Peer, str]]) -> None:
        """Connect to these peers, now and at every heartbeat at which one is not connected."""
        self._wanted = wanted
        self._wanted_ids = {peer.id for peer, _ in wanted}
        self._connect_wanted()

    def announce_draining(self) -> None:
        """Send Draining to all peers that opened a connection, and to those that open one later."""
        self._is_draining = True
        for peer_id, connection in self._connections.items():
            if not connection.is_outgoing:
                self.actions.append(Send(peer_id, encode(Draining())))

    # What happens to it

    def on_stranger(self, stranger: Stranger, frames: list[Buffer], identity: str = "") -> None:
        """Handle the first message of a connection to the inbox, which must be a fitting Hello.

        `identity` is the id that the connection itself has, if it has one.
        """
        try:
            hello = decode(frames, Hello)
        except WireError as e:
            self._refuse(stranger, identity, f"say Hello first ({e})")
            return
        reason = self._objection_to(hello) or self._objection_at_inbox(hello, identity)
        if reason:
            self._refuse(stranger, hello.id, reason)
        elif hello.id in self._connections:
            self._waiting[hello.id] = (stranger, hello)
            self.actions.append(Hold(stranger))
        else:
            self._admit(stranger, hello)

    def on_stranger_gone(self, stranger: Stranger) -> None:
        """Forget a stranger whose connection is closed."""
        for peer_id, (waiting, _) in self._waiting.items():
            if waiting is stranger:
                del self._waiting[peer_id]
                return

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
        if not connection.is_up and not isinstance(message, Hello | Goodbye):
            self._end(connection, "it did not say Hello first")
            return
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
            case Hello():
                self._end(connection, "it sent an invalid message: it says Hello again")
            case _:
                self.events.append(Received(peer_id, connection.role, message))

    def on_broken(self, peer_id: str, reason: str) -> None:
        """Handle the end of a connection to a peer, or that it cannot be opened."""
        if connection := self._connections.get(peer_id):
            self._end(connection, reason)

    def renew(self, peer_id: str) -> None:
        """Renew the lease of a peer whose messages this process does not read yet."""
        if connection := self._connections.get(peer_id):
            connection.last_seen = self._clock()

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

    def _objection_at_inbox(self, hello: Hello, identity: str) -> str:
        """Return why the sender of a Hello cannot be a peer at the inbox; empty if it can."""
        if identity not in ("", hello.id):
            return "the id in Hello is not the connection's"
        if (hello.role, self._me.role) not in CONNECTS:
            return f"a {hello.role} does not connect to a {self._me.role}"
        if hello.id == self._me.id:
            return "the id in Hello is that of this process"
        old = self._connections.get(hello.id)
        if old and old.is_outgoing:
            return OWN_CONNECTION
        if hello.id in self._waiting:
            return "another connection waits for this id"
        num_peers = sum(not each.is_outgoing for each in self._connections.values())
        return TOO_MANY if num_peers >= MAX_INBOX_PEERS else ""

    def _admit(self, stranger: Stranger, hello: Hello) -> None:
        peer_id = hello.id
        self._connections[peer_id] = Connection(
            Peer(peer_id, ""), hello.role, is_outgoing=False, is_up=True, last_seen=self._clock()
        )
        self.actions.append(Admit(stranger, peer_id))
        self._allow(peer_id, hello.role)
        self.actions.append(Send(peer_id, encode(self._me)))
        if self._is_draining:
            self.actions.append(Send(peer_id, encode(Draining())))
        self.events.append(PeerUp(peer_id, hello.role))

    def _allow(self, peer_id: str, role: str) -> None:
        self.actions.append(Allow(peer_id, max_tensor_bytes(role, self._me.role)))

    def _refuse(self, stranger: Stranger, peer_id: str, reason: str) -> None:
        self._log.warning("refused a connection", peer=peer_id, reason=reason)
        self.actions.append(Refuse(stranger, encode(Goodbye(reason=reason))))

    def _refuse_waiting(self, peer_id: str, reason: str) -> None:
        if waiting := self._waiting.pop(peer_id, None):
            self._refuse(waiting[0], peer_id, reason)

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
            self._allow(peer.id, connection.role)
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
        self.actions.append(Close(peer_id))
        self.events.append(PeerDown(peer_id, connection.role, reason))
        if waiting := self._waiting.pop(peer_id, None):
            stranger, hello = waiting
            if objection := self._objection_to(hello):
                self._refuse(stranger, peer_id, objection)
            else:
                self._admit(stranger, hello)


OWN_CONNECTION = "this process connects to the member of that id itself"
TOO_MANY = "there are too many connections"


def hung_reason(seconds: float) -> str:
    """Return what is said of a process whose work loop has been stuck for that many seconds."""
    return f"hung: its work loop made no progress for {seconds:.0f} s"
