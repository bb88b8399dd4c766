"""One connection: a socket that is read and written without waiting, and threads for what is long.

The thread that holds the lock of `common/links.py` calls everything here. It reads what has arrived
and writes what the kernel takes at once. Two further threads of a stream are started only when they
are needed:

- The reading thread receives the rest of a large frame in one system call, which needs neither the
  interpreter nor the loop that has other work.
- The writing thread connects, and then writes what the kernel did not take at once.
"""

import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from common.sockets import connected_socket
from common.wire import Buffer
from common.zmtp import Decoder, ZmtpError, introduction, pack

CHUNK_BYTES = 256 * 1024
"""How much of one peer is read before the others have their turn."""
LONG_FRAME_BYTES = 256 * 1024
"""What is missing of a frame is left to the reading thread if it is at least this much."""
MAX_STRANGER_BYTES = 64 * 1024
"""How much is read of a peer until its Hello is accepted."""
COPIED_BYTES = 512 * 1024
"""Smaller buffers that must wait are copied; larger ones must not change until they are sent."""
JOINED_BYTES = 64 * 1024
"""A message of at most this size is written from one buffer."""
MAX_BACKLOG_BYTES = 1024 * 2**20
"""What may wait to be sent to one peer."""
MAX_BUFFERS = 512
"""Buffers in one system call; the kernel takes 1024."""

WRITE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Stream:
    """A connection to one peer, which it reads and writes in whole messages."""

    def __init__(
        self,
        connection: socket.socket | None,
        address: str,
        identity: str,
        on_progress: Callable[["Stream"], None],
    ) -> None:
        """Take over an accepted connection, or begin to connect to `address` if it is None.

        `on_progress` is called by a thread of the stream when it is connected, when a long frame
        was received, and when it failed.

        Raises
        ------
        RuntimeError
            if there cannot be another thread.
        """
        self.peer_id = ""
        """The id of the peer; empty until its Hello is accepted, if it opened the connection."""
        self.is_known = False
        """Whether the peer's Hello was accepted."""
        self.is_outgoing = connection is None
        self.is_closed = False
        self.is_held = False
        """Whether it must wait until a peer of the same id is gone."""
        self.is_paused = False
        """Whether it is not read because the loop has not handled what arrived before."""
        self.failure = ""
        """Why the connection is broken; empty if it is not."""
        self.num_early_bytes = 0
        """How much arrived since the loop waited last, if `turn` is current."""
        self.turn = 0
        self.decoder = Decoder()
        self._address = address
        self._on_progress = on_progress
        self._socket = connection
        self._num_stranger_bytes = 0
        self._backlog = deque[Buffer]()
        self._num_backlog_bytes = 0
        self._is_writing = connection is None
        self._cannot_write = False
        self._changed = threading.Condition(threading.Lock())
        """Notified when the backlog, `is_closed` or `_is_writing` changes."""
        self._long_frames: SimpleQueue[memoryview | None] | None = None
        self._num_users = 1
        """Who uses the socket: this object and its threads. The last one closes it."""
        self._writer: threading.Thread | None = None
        self._reader: threading.Thread | None = None
        self._must_wait = connection is None
        """Whether messages must wait until the peer is ready for them."""
        if connection is None:
            self._introduction = introduction("DEALER", identity)
            self._start_writer()
        else:
            self._write([introduction("ROUTER", identity)])

    def fileno(self) -> int:
        """Return the descriptor of the connection, or -1 while it is not connected or closed."""
        return -1 if self._socket is None else self._socket.fileno()

    # Reading

    def receive(self, scratch: memoryview) -> None:
        """Read once what has arrived.

        Raises
        ------
        ZmtpError
            if the connection is broken, or the peer sends too much.
        """
        assert self._socket is not None
        missing = self.decoder.missing()
        target = scratch if missing is None else missing
        try:
            num = self._socket.recv_into(
                target, min(len(target), self._allowed()), socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        except OSError as e:
            raise ZmtpError(BROKEN) from e
        if num == 0:
            raise ZmtpError(BROKEN)
        if missing is None:
            self.decoder.feed(scratch[:num])
        else:
            self.decoder.note_filled(num)
        self.num_early_bytes += num
        if not self.is_known:
            self._num_stranger_bytes += num

    def _allowed(self) -> int:
        """Return how much may be read now."""
        if self.is_known:
            return CHUNK_BYTES
        allowed = MAX_STRANGER_BYTES - self._num_stranger_bytes
        if allowed <= 0:
            raise ZmtpError(f"it sent {MAX_STRANGER_BYTES} bytes without a Hello")
        return allowed

    def begin_sending(self) -> None:
        """Send what has waited until the peer was ready; to be called after each reading."""
        if self._must_wait and self.decoder.is_ready:
            with self._changed:
                self._must_wait = False
                self._changed.notify_all()

    def begin_long_frame(self) -> bool:
        """Leave the rest of a long frame to the reading thread; return whether there is one."""
        missing = self.decoder.missing()
        if missing is None or len(missing) < LONG_FRAME_BYTES:
            return False
        if self._long_frames is None:
            self._long_frames = SimpleQueue()
            self._reader = self._start(self._run_reader, "links-read")
        self._long_frames.put(missing)
        return True

    def _run_reader(self) -> None:
        assert self._long_frames is not None and self._socket is not None
        while (missing := self._long_frames.get()) is not None:
            num_filled = 0
            with suppress(OSError):
                while num_filled < len(missing):
                    num = self._socket.recv_into(missing[num_filled:], 0, socket.MSG_WAITALL)
                    if num == 0:
                        break
                    num_filled += num
            self.decoder.note_filled(num_filled)
            self.num_early_bytes += num_filled
            if num_filled < len(missing):
                self.failure = BROKEN
            del missing
            self._on_progress(self)
        self._release()

    # Writing

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send a message without waiting.

        A failure is not reported here, because what the peer sent before it is read first.
        """
        self._write(pack(frames))

    def _write(self, buffers: list[Buffer]) -> None:
        with self._changed:
            if self.is_closed or self._cannot_write:
                return
            if not self._backlog and not self._is_writing and not self._must_wait:
                buffers = self._write_now(buffers)
            if not buffers:
                return
            size = sum(map(len, buffers))
            if self._num_backlog_bytes + size > MAX_BACKLOG_BYTES:
                self._give_up("it does not read what it is sent")
                return
            self._num_backlog_bytes += size
            self._backlog.extend(
                bytes(buffer) if len(buffer) < COPIED_BYTES else buffer for buffer in buffers
            )
            if self._writer is not None:
                self._changed.notify_all()
            elif not self.is_outgoing:
                self._start_writer()

    def _write_now(self, buffers: list[Buffer]) -> list[Buffer]:
        """Write what the kernel takes; return the rest."""
        assert self._socket is not None
        try:
            if sum(map(len, buffers)) <= JOINED_BYTES:
                joined = b"".join(buffers)
                return rest_of([joined], self._socket.send(joined, WRITE_FLAGS))
            return rest_of(buffers, self._socket.sendmsg(buffers[:MAX_BUFFERS], [], WRITE_FLAGS))
        except BlockingIOError:
            return buffers
        except OSError:
            return []  # the end of the connection is read

    def _give_up(self, reason: str) -> None:
        self.failure = reason
        self._cannot_write = True
        self._backlog.clear()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _start_writer(self) -> None:
        self._writer = self._start(self._run_writer, "links-write")

    def _run_writer(self) -> None:
        try:
            if self._socket is None:
                self._connect()
            while buffers := self._next_buffers():
                self._write_all(buffers)
        except (OSError, ValueError) as e:
            self._fail(f"{BROKEN} ({e})")
        self._release()

    def _connect(self) -> None:
        connected = connected_socket(self._address)
        connected.sendall(self._introduction)
        with self._changed:
            self._socket = connected
            self._is_writing = False
        self._on_progress(self)

    def _next_buffers(self) -> list[Buffer]:
        """Wait for something to write; return nothing once the stream is closed."""
        with self._changed:
            self._is_writing = False
            self._changed.notify_all()
            while (not self._backlog or self._must_wait) and not self.is_closed:
                self._changed.wait()
            buffers = list(self._backlog)
            self._backlog.clear()
            self._is_writing = bool(buffers)
            return buffers

    def _write_all(self, buffers: list[Buffer]) -> None:
        assert self._socket is not None
        while buffers:
            num = self._socket.sendmsg(buffers[:MAX_BUFFERS], [], socket.MSG_NOSIGNAL)
            with self._changed:
                self._num_backlog_bytes -= num
            buffers = rest_of(buffers, num)

    def _fail(self, reason: str) -> None:
        """Note that the connection cannot be used; called by the writing thread."""
        with self._changed:
            was_connected = self._socket is not None
            self._is_writing = False
            self._cannot_write = True
            self._backlog.clear()
            self._num_backlog_bytes = 0
            self._changed.notify_all()
        # What the peer sent before it ended is read first, if there was a connection.
        if not was_connected:
            self.failure = reason
        self._on_progress(self)

    # The end

    def flush(self, seconds: float) -> None:
        """Wait until everything is handed to the kernel, at most `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._backlog and not self._is_writing, seconds)

    def close(self) -> None:
        """Close the connection; what waits to be sent is dropped."""
        with self._changed:
            if self.is_closed:
                return
            self.is_closed = True
            self._backlog.clear()
            self._changed.notify_all()
        if self._socket is not None:
            self._discard_unread(self._socket)
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR if self._num_users > 1 else socket.SHUT_WR)
        if self._long_frames is not None:
            self._long_frames.put(None)
        self._release()

    def _discard_unread(self, connection: socket.socket) -> None:
        """Discard a little of what arrived: closed with it, TCP drops what it has not sent."""
        with suppress(OSError):
            for _ in range(4):
                if len(connection.recv(CHUNK_BYTES, socket.MSG_DONTWAIT)) < CHUNK_BYTES:
                    return

    def join(self, seconds: float) -> None:
        """Wait until the threads have ended, after `close`."""
        for thread in (self._reader, self._writer):
            if thread is not None:
                thread.join(seconds)

    def _start(self, run: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._num_users += 1
        try:
            thread.start()
        except RuntimeError:
            self._num_users -= 1
            raise
        return thread

    def _release(self) -> None:
        with self._changed:
            self._num_users -= 1
            is_last = self._num_users == 0
        if is_last and self._socket is not None:
            self._socket.close()


BROKEN = "its connection broke: the process ended or cannot be reached"


def rest_of(buffers: list[Buffer], num_written: int) -> list[Buffer]:
    """Return what is left of buffers after that many bytes were written."""
    for index, buffer in enumerate(buffers):
        if num_written < len(buffer):
            return [memoryview(buffer)[num_written:], *buffers[index + 1 :]]
        num_written -= len(buffer)
    return []
