"""The connections of a service that is tested: the real protocol, without sockets.

Each message passes through the wire format in both directions. So what arrives is well-framed, and
what the service sends must be acceptable to its receiver.
"""

from typing import Any

from common.connections import Connections
from common.events import Event
from common.hello import hello
from common.hops import CONNECTS
from common.messages import HOPS, Hello, Message, Peer
from common.progress import Progress
from common.wire import decode, encode

FINGERPRINT = "f" * 64


class Door:
    """The peers of one service. It is also what the service sends on."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._connections: Connections[Any] = Connections(
            hello(f"{role}-0", role, FINGERPRINT), Progress()
        )
        self._roles: dict[str, str] = {}
        """The role of each peer that this service connects to."""
        self.sent: list[tuple[str, Any]] = []

    # The service's side

    def connect(self, peer: Peer, role: str) -> None:
        self._connections.connect(peer, role)
        self._connections.actions.clear()

    def send(self, peer_id: str, message: Message) -> None:
        frames = encode(message)
        if self._connections.may_send(peer_id, message):
            role = self._connections._connections[peer_id].role
            decode(frames, HOPS[self._role, role])
            self.sent.append((peer_id, message))

    # The peers' side

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._connections

    def __len__(self) -> int:
        return len(self._connections._connections) + len(self._connections._waiting)

    def join(self, peer_id: str, role: str) -> None:
        """Let a peer connect, or answer if the service connects to it."""
        greeting = encode(hello(peer_id, role, FINGERPRINT))
        if (role, self._role) in CONNECTS and peer_id not in self._roles:
            self._connections.on_stranger(object(), greeting, peer_id)
        else:
            self.connect(Peer(peer_id, f"ipc:///{peer_id}"), role)
            self._connections.on_frames(peer_id, greeting)

    def say(self, peer_id: str, message: Message) -> bool:
        """Let a message of a peer arrive; return whether the peer is connected."""
        if peer_id in self._connections:
            self._connections.on_frames(peer_id, encode(message))
        elif isinstance(message, Hello):
            self._connections.on_stranger(object(), encode(message))
        else:
            return False
        return True

    def leave(self, peer_id: str) -> None:
        self._connections.on_broken(peer_id, "its process died")

    def leave_all(self, but: tuple[str, ...] = ()) -> None:
        """Break all connections, also those that are waiting or in progress."""
        while gone := [peer_id for peer_id in self._connections._connections if peer_id not in but]:
            for peer_id in gone:
                self.leave(peer_id)

    def take_events(self) -> list[Event[Any]]:
        """Return what happened since the last call, as the work loop gets it."""
        self._connections.actions.clear()
        return self._connections.take_events()
