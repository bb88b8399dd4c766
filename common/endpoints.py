"""The ZeroMQ sockets of a process: its inbox, and one socket to each peer it connected to.

They read messages into the protocol (`common/connections.py`) and perform what it asks for. None of
this is safe for several threads: `common/links.py` calls it under a lock.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic

import zmq

from common.connections import Close, Connections, Open, Send
from common.events import M
from common.messages import Peer
from common.poller import Poller, Source
from common.process import CannotStart
from common.sockets import (
    Socket,
    address_of,
    has_message,
    new_dealer,
    new_inbox,
    receive_frames,
    send_frames,
)
from common.wire import Buffer


@dataclass(frozen=True, slots=True)
class Dealer:
    """The socket of a connection that this process opened."""

    peer_id: str
    socket: Socket
    monitor: Socket
    """Readable once the connection is broken."""


class Endpoints(Generic[M]):
    """All sockets of a process, registered in `poller`."""

    def __init__(self, connections: Connections[M], my_id: str, poller: Poller) -> None:
        self._connections = connections
        self._my_id = my_id
        self._poller = poller
        self._context = zmq.Context()
        self._inbox: Socket | None = None
        self._dealers: dict[str, Dealer] = {}
        self._dealers_by_source: dict[Source, Dealer] = {}

    def bind(self, listen: str, advertise: str) -> str:
        """Bind the inbox, and return the address that others connect to.

        Raises
        ------
        CannotStart
            if `listen` cannot be bound.
        """
        inbox = new_inbox(self._context)
        try:
            inbox.bind(listen)
        except zmq.ZMQError as e:
            raise CannotStart(
                f"cannot listen on {listen} ({e.strerror}): free it, or give another --listen"
            ) from e
        self._inbox = inbox
        self._poller.register(inbox)
        return address_of(inbox, advertise)

    def read(self, source: Source) -> None:
        """Read a socket until it has no more messages."""
        if source is self._inbox:
            self._read_messages(self._inbox, self._on_inbox_frames)
        elif dealer := self._dealers_by_source.get(source):
            self._read_dealer(dealer, is_broken=source is dealer.monitor)

    def _read_dealer(self, dealer: Dealer, is_broken: bool) -> None:
        if is_broken and not has_message(dealer.monitor):
            return
        # Messages that arrived before the connection broke are read first.
        self._read_messages(
            dealer.socket, lambda frames: self._connections.on_frames(dealer.peer_id, frames)
        )
        if is_broken and not dealer.socket.closed:
            self._connections.on_broken(
                dealer.peer_id, "its connection broke: the process ended or cannot be reached"
            )
            self.perform_actions()

    def _on_inbox_frames(self, frames: list[Buffer]) -> None:
        peer_id = bytes(frames[0]).decode(errors="replace")
        self._connections.on_inbox_frames(peer_id, frames[1:])

    def _read_messages(self, socket: Socket, handle: Callable[[list[Buffer]], None]) -> None:
        """Read a socket until it has no more messages, or a message closes it."""
        with suppress(zmq.Again):
            more = True
            while more:
                handle([frame.buffer for frame in receive_frames(socket)])
                self.perform_actions()
                # Asking takes half the time of an exception.
                more = not socket.closed and has_message(socket)

    def perform_actions(self) -> None:
        """Do what the protocol asks for, in its order."""
        actions = self._connections.actions
        while actions:
            match actions.popleft():
                case Send(peer_id, frames):
                    self.send(peer_id, frames)
                case Open(peer, frames):
                    self._open(peer, frames)
                case Close(peer_id):
                    self._close(peer_id)

    def send(self, peer_id: str, frames: list[Buffer]) -> None:
        """Send a message to a connected peer, or to one at the inbox that is refused."""
        if dealer := self._dealers.get(peer_id):
            send_frames(dealer.socket, frames)
            self._poller.note_use(dealer.socket)
            return
        assert self._inbox is not None
        self._poller.note_use(self._inbox)
        try:
            send_frames(self._inbox, [peer_id.encode(), *frames])
        except zmq.ZMQError as e:
            # EHOSTUNREACH: the connection broke, and its lease has not ended yet.
            if e.errno != zmq.EHOSTUNREACH:
                raise

    def _open(self, peer: Peer, frames: list[Buffer]) -> None:
        dealer = Dealer(peer.id, *new_dealer(self._context, self._my_id))
        self._dealers[peer.id] = dealer
        for source in (dealer.socket, dealer.monitor):
            self._dealers_by_source[source] = dealer
            self._poller.register(source)
        try:
            dealer.socket.connect(peer.address)
        except zmq.ZMQError as e:
            self._connections.on_broken(
                peer.id, f"its address {peer.address!r} cannot be connected to: {e.strerror}"
            )
            return
        self.send(peer.id, frames)

    def _close(self, peer_id: str) -> None:
        dealer = self._dealers.pop(peer_id)
        for source in (dealer.socket, dealer.monitor):
            del self._dealers_by_source[source]
            self._poller.unregister(source)
        dealer.socket.disable_monitor()
        dealer.monitor.close(linger=0)
        dealer.socket.close(linger=0)

    def close(self, linger: int) -> None:
        """Close all sockets; what is not sent within `linger` milliseconds is dropped."""
        self._context.destroy(linger=linger)
