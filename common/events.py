"""What happens on connections, as work loops see it; and what a work loop needs to send."""

from typing import Generic, Protocol, TypeVar

import msgspec

from common.messages import Message, Peer

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True, bound=Message)


class PeerUp(msgspec.Struct, frozen=True):
    """A peer is connected. `address` is empty if the peer connected to this process."""

    peer_id: str
    role: str
    address: str = ""


class PeerDown(msgspec.Struct, frozen=True):
    """A peer is dead to this process: its connection broke, its lease ended, or it hangs."""

    peer_id: str
    role: str
    reason: str


class PeerDraining(msgspec.Struct, frozen=True):
    """A peer takes no new work and leaves once it holds nothing."""

    peer_id: str
    role: str


class Received(msgspec.Struct, Generic[M], frozen=True):
    """A message of a peer. `M` is the union of all messages that the process handles."""

    peer_id: str
    role: str
    message: M


Event = PeerUp | PeerDown | PeerDraining | Received[M]


class Sender(Protocol[M_contra]):
    """The sending side of `common.links.Links`, restricted to the messages of one service."""

    def connect(self, peer: Peer, role: str) -> None: ...

    def send(self, peer_id: str, message: M_contra) -> None: ...
