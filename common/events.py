"""What happens on connections, as a work loop hears of it."""

from typing import Any

import msgspec


class PeerUp(msgspec.Struct, frozen=True):
    """`address` is empty where the peer connected to us."""

    peer_id: str
    role: str
    address: str = ""


class PeerDown(msgspec.Struct, frozen=True):
    peer_id: str
    role: str
    reason: str


class PeerDraining(msgspec.Struct, frozen=True):
    """The peer takes nothing new and leaves when it holds nothing any more."""

    peer_id: str
    role: str


class Received(msgspec.Struct, frozen=True):
    peer_id: str
    role: str
    message: Any


Event = PeerUp | PeerDown | PeerDraining | Received
