"""What happens on connections, as a work loop hears of it."""

from typing import Any

import msgspec


class Up(msgspec.Struct, frozen=True):
    """`address` is empty where the peer connected to us."""

    peer_id: str
    role: str
    address: str = ""


class Down(msgspec.Struct, frozen=True):
    peer_id: str
    role: str
    reason: str


class Draining(msgspec.Struct, frozen=True):
    """The peer takes nothing new and leaves when it holds nothing any more."""

    peer_id: str
    role: str


class Received(msgspec.Struct, frozen=True):
    peer_id: str
    role: str
    message: Any


Event = Up | Down | Draining | Received
