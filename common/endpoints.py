"""The connections of a process as streams of bytes: those at its inbox, and those it opened.

They read messages into the protocol (`common/connections.py`) and perform what it asks for. None of
this is safe for several threads: `common/links.py` calls it under a lock.

What a peer may make this process hold is bounded at every point:

- MAX_STRANGERS connections without an accepted Hello, of 64 KiB and STRANGER_SECONDS each.
- One message of each peer, as large as its hop allows (`common/hops.py`).
- MAX_EARLY_BYTES of each peer that the loop has not handled. Beyond it the peer is not read.
"""

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic

from common.connections import Admit, Allow, Close, Connections, Hold, Open, Refuse, Send
from common.events import M
from common.logs import get_logger
from common.process import CannotStart
from common.sockets import address_of, listening_socket, remove_unix_socket
from common.streams import BROKEN, CHUNK_BYTES, Stream
from common.wire import Buffer
from common.zmtp import ZmtpError

MAX_STRANGERS = 128
"""Connections to the inbox without an accepted Hello; for a further one, the oldest is closed."""
STRANGER_SECONDS = 5.0
"""How long a connection to the inbox may take until its Hello is accepted."""
MAX_EARLY_BYTES = 64 * 2**20
"""What is read of a peer before the loop waits again, which it does once it has handled all."""
MAX_ACCEPTS = 64
"""Connections accepted before others have their turn."""
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Endpoints(Generic[M]):
    """All connections of a process, registered in `poller`."""

    def __init__(
        self,
        connections: Connections[M],
        my_id: str,
        poller: select.epoll,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wake` makes the thread that receives call `continue_streams`, from any thread."""
        self.turn = 0
        """Counts how often the loop has waited; 0 if it never does."""
        self.has_paused = False
        """Whether there are peers that are not read until the loop waits again."""
        self._connections = connections
        self._my_id = my_id
        self._poller = poller
        self._wake = wake
        self._clock = clock
        self._listener: socket.socket | None = None
        self._is_accepting = False
        self._streams: dict[int, Stream] = {}
        """The streams that are read, by their descriptor."""
        self._peers: dict[str, Stream] = {}
        self._strangers: dict[Stream, float] = {}
        """When each connection without an accepted Hello was made, in this order."""
        self._progressed = deque[Stream]()
        self._scratch = memoryview(bytearray(CHUNK_BYTES))
        self._closing = threading.Lock()
        self._is_closed = False
        self._log = get_logger().bind(member=my_id)

    def bind(self, listen: str, advertise: str) -> str:
        """Bind the inbox, and return the address that others connect to.

        Raises
        ------
        CannotStart
            if `listen` cannot be bound.
        """
        try:
            self._listener = listening_socket(listen)
        except (OSError, ValueError) as e:
            reason = e.strerror or str(e) if isinstance(e, OSError) else str(e)
            raise CannotStart(
                f"cannot listen on {listen} ({reason}): free it, or give another --listen"
            ) from e
        self._accept_again()
        return address_of(self._listener, advertise)

    # Reading

    def read(self, descriptor: int) -> None:
        """Read once from a descriptor that is readable."""
        if self._listener is not None and descriptor == self._listener.fileno():
            self._accept(self._listener)
        elif stream := self._streams.get(descriptor):
            try:
                stream.receive(self._scratch)
            except ZmtpError as e:
                self._lose(stream, stream.failure or str(e))
                return
            self._read_messages(stream)

    def continue_streams(self) -> None:
        """Go on with the streams whose threads have done their part."""
        while self._progressed:
            stream = self._progressed.popleft()
            if not stream.is_closed and not stream.is_held and not stream.is_paused:
                self._watch(stream)
                self._read_messages(stream)

    def resume(self) -> None:
        """Read the peers again that had to wait for the loop."""
        self.has_paused = False
        for stream in self._peers.values():
            if stream.is_paused:
                stream.is_paused = False
                self._progressed.append(stream)
        self.continue_streams()

    def _read_messages(self, stream: Stream) -> None:
        """Handle the messages of a stream that are complete."""
        try:
            while not stream.is_closed and not stream.is_held:
                frames = stream.decoder.next_message()
                if frames is None:
                    break
                self._on_message(stream, frames)
                self.perform_actions()
        except ZmtpError as e:
            self._lose(stream, f"it sent an invalid message: {e}")
        stream.begin_sending()
        if stream.is_closed or stream.is_held:
            return
        if stream.failure:
            self._lose(stream, stream.failure)
        elif self._is_too_early(stream):
            stream.is_paused = True
            self.has_paused = True
            self._unwatch(stream)
        elif stream.begin_long_frame():
            self._unwatch(stream)

    def _on_message(self, stream: Stream, frames: list[Buffer]) -> None:
        if stream.peer_id:
            self._connections.on_frames(stream.peer_id, frames)
        else:
            self._connections.on_stranger(stream, frames, stream.decoder.identity)

    def _is_too_early(self, stream: Stream) -> bool:
        if stream.turn != self.turn:
            stream.turn = self.turn
            stream.num_early_bytes = 0
        return self.turn > 0 and stream.num_early_bytes >= MAX_EARLY_BYTES

    def _lose(self, stream: Stream, reason: str) -> None:
        """Handle the end of a connection."""
        if stream.peer_id:
            self._connections.on_broken(stream.peer_id, reason)
            self.perform_actions()
        else:
            if reason != BROKEN:
                self._log.warning("refused a connection", reason=reason)
            self._drop_stranger(stream)

    # Accepting

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in OUT_OF_RESOURCES:
                    self._log.warning("cannot accept connections", reason=e.strerror)
                    self._poller.unregister(listener)
                    self._is_accepting = False
                    return
                continue  # the connection ended before it was accepted
            connection.setblocking(True)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Stream(connection, "", "", self._on_progress)
            self._strangers[stream] = self._clock()
            self._watch(stream)
            if len(self._strangers) > MAX_STRANGERS:
                self._log.warning("closed the oldest of too many connections without a Hello")
                self._drop_stranger(next(iter(self._strangers)))

    def _accept_again(self) -> None:
        if self._listener is not None and not self._is_accepting:
            self._poller.register(self._listener, select.EPOLLIN)
            self._is_accepting = True

    def _drop_stranger(self, stream: Stream) -> None:
        self._connections.on_stranger_gone(stream)
        self._strangers.pop(stream, None)
        self._unwatch(stream)
        stream.close()

    # What time does

    def heartbeat(self) -> None:
        """End what takes too long, and try again what failed; to be called each second."""
        self._accept_again()
        for stream, began in list(self._strangers.items()):
            if self._clock() - began >= STRANGER_SECONDS:
                self._log.warning(
                    "refused a connection", reason=f"no Hello within {STRANGER_SECONDS:g} s"
                )
                self._drop_stranger(stream)
        for peer_id, stream in self._peers.items():
            if stream.is_paused:
                self._connections.renew(peer_id)

    # Actions

    def perform_actions(self) -> None:
        """Do what the protocol asks for, in its order."""
        actions = self._connections.actions
        while actions:
            match actions.popleft():
                case Send(peer_id, frames):
                    self.send(peer_id, frames)
                case Open(peer, frames):
                    self._open(peer.id, peer.address, frames)
                case Close(peer_id):
                    self._close(peer_id)
                case Admit(stream, peer_id):
                    self._admit(stream, peer_id)
                case Allow(peer_id, num_bytes):
                    self._peers[peer_id].is_known = True
                    self._peers[peer_id].decoder.max_tensor_bytes = num_bytes
                case Hold(stream):
                    stream.is_held = True
                    self._unwatch(stream)
                case Refuse(stream, frames):
                    stream.send(frames)
                    self._drop_stranger(stream)

    def send(self, peer_id: str, frames: list[Buffer]) -> None:
        """Send a message to a peer that is connecting or connected."""
        self._peers[peer_id].send(frames)

    def _open(self, peer_id: str, address: str, frames: list[Buffer]) -> None:
        try:
            stream = Stream(None, address, self._my_id, self._on_progress)
        except RuntimeError as e:
            self._connections.on_broken(peer_id, f"it cannot be connected to: {e}")
            return
        stream.peer_id = peer_id
        self._peers[peer_id] = stream
        stream.send(frames)

    def _admit(self, stream: Stream, peer_id: str) -> None:
        del self._strangers[stream]
        stream.peer_id = peer_id
        self._peers[peer_id] = stream
        if stream.is_held:
            stream.is_held = False
            self._on_progress(stream)

    def _close(self, peer_id: str) -> None:
        if stream := self._peers.pop(peer_id, None):
            self._unwatch(stream)
            stream.close()

    def _watch(self, stream: Stream) -> None:
        descriptor = stream.fileno()
        if descriptor >= 0 and descriptor not in self._streams:
            self._streams[descriptor] = stream
            self._poller.register(descriptor, select.EPOLLIN)

    def _unwatch(self, stream: Stream) -> None:
        if self._streams.get(stream.fileno()) is stream:
            del self._streams[stream.fileno()]
            self._poller.unregister(stream.fileno())

    def _on_progress(self, stream: Stream) -> None:
        """Note that a stream can go on; called by any thread."""
        self._progressed.append(stream)
        with self._closing:
            if not self._is_closed:
                self._wake()

    def close(self, seconds: float) -> None:
        """Close everything; what is not sent within `seconds` is dropped."""
        ends = self._clock() + seconds
        streams = [*self._peers.values(), *self._strangers]
        for stream in self._peers.values():
            stream.flush(max(0.0, ends - self._clock()))
        with self._closing:
            self._is_closed = True
        for stream in streams:
            stream.close()
        for stream in streams:
            stream.join(max(0.1, ends - self._clock()))
        if self._listener is not None:
            name = self._listener.getsockname()
            if self._listener.family == socket.AF_UNIX:
                remove_unix_socket(os.fsdecode(name))
            self._listener.close()
