"""The threads behind the connections of a process: which one receives, and what wakes it.

A process has at most one inbox, and opens one connection to each peer that it gives work to. Both
directions of a hop use the one connection. These files share the work:

- `common/connections.py` is the protocol: who is connected, and what a message leads to.
- `common/endpoints.py` has the connections as streams, and the limits of what peers may send.
- `common/streams.py` reads and writes one of them, and `common/zmtp.py` knows its bytes.
- This file has the threads and locks.

Two threads can receive. A loop that calls `wait` receives on its own thread, because passing each
message from one thread to another would cost more than all the rest of it. The I/O thread sends the
heartbeats, and receives while the loop is busy, or if no loop ever calls `wait`:

                          the loop calls `wait`
           +---------------------------------------------------+
           v                                                   |
    THE LOOP RECEIVES                              THE I/O THREAD RECEIVES
    in `wait`. The I/O thread sleeps               whatever arrives, and sends
    from heartbeat to heartbeat.                   the heartbeats in between.
           |                                                   ^
           +---------------------------------------------------+
             the I/O thread has slept until a heartbeat, and
             meanwhile the loop has not waited

Right after a change both threads may poll, and either may get the next message. Only one receives
at a time, so events stay in order. A thread that polls is woken by one of two eventfds:

- `_recheck_fd` wakes the thread that receives. It is written if a call such as `send` leads to
  events, or if a thread of a stream has done its part.
- `_wake_fd` ends the loop's `wait`. It is written by `wake`, which the I/O thread calls when it has
  reported events that the loop should handle.

Sending needs neither thread. The calling thread writes to the socket itself, under a lock, and
leaves the rest to a thread of the stream if the kernel does not take all at once.
"""

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic

from common.connections import Connections
from common.endpoints import Endpoints
from common.events import Event, M
from common.logs import get_logger
from common.messages import Hello, Message, Peer
from common.process import EXIT_FAILED, CannotStart
from common.progress import Progress
from common.wire import Buffer, encode

CLOSE_SECONDS = 0.5


class Links(Generic[M]):
    """All connections of this process. `M` is the union of all messages that it handles.

    Any thread may call `connect`, `keep_connected`, `send`, `announce_draining` and `wake`. After
    `close` they do nothing. Only one loop may call `wait`.
    """

    def __init__(
        self,
        me: Hello,
        listen: str,
        advertise: str,
        on_event: Callable[[Event[M]], None],
        progress: Progress | None = None,
    ) -> None:
        """Bind the inbox to `listen`, unless it is empty, and start the I/O thread.

        `on_event` is called with each event, in order, on the thread that received it. It must only
        pass the event on. `advertise` is the host that others reach the inbox by. `progress` is
        what heartbeats report.

        Raises
        ------
        CannotStart
            if `listen` cannot be bound.
        """
        self._on_event = on_event
        self._poller = select.epoll()
        self._connections = Connections[M](me, progress or Progress())
        self._recheck_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._endpoints = Endpoints(self._connections, me.id, self._poller, self._recheck)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller.register(self._recheck_fd, select.EPOLLIN)
        self._waiter = select.epoll()
        for descriptor in (self._poller.fileno(), self._wake_fd):
            self._waiter.register(descriptor, select.EPOLLIN)
        self._lock = threading.RLock()
        """Held while the connections or the endpoints are used."""
        self._receiving = threading.Lock()
        """Held while a thread receives and reports events."""
        self._is_waiting = False
        self._has_waited = False
        """Whether the loop has waited since the I/O thread looked last."""
        self._is_closed = False
        self._ending = threading.Event()
        self._log = get_logger().bind(member=me.id)
        self.address = self._bind(listen, advertise) if listen else ""
        self._thread = threading.Thread(target=self._run_io_thread, name="links", daemon=True)
        self._thread.start()

    def _bind(self, listen: str, advertise: str) -> str:
        try:
            return self._endpoints.bind(listen, advertise)
        except CannotStart:
            self._free(seconds=0.0)
            raise

    # Called by any thread

    def connect(self, peer: Peer, role: str) -> None:
        """Connect to a peer, unless there is a connection.

        Messages that are sent to it in the meantime wait in the connection.
        """
        self._do(lambda: self._connections.connect(peer, role))

    def keep_connected(self, wanted: list[tuple[Peer, str]]) -> None:
        """Connect to these (peer, role), and again each second if a connection breaks.

        Connections to other peers stay as they are.
        """
        self._do(lambda: self._connections.keep_connected(wanted))

    def send(self, peer_id: str, message: Message) -> None:
        """Send a message to a peer that is connected or connecting.

        A message to any other peer is dropped, as it would be if the peer died a moment later.
        So is one that the peer's role does not handle.
        """
        frames = encode(message)
        self._do(lambda: self._send(peer_id, message, frames))

    def announce_draining(self) -> None:
        """Send Draining to all peers that connected to the inbox, and to those that do so later."""
        self._do(self._connections.announce_draining)

    def wake(self) -> None:
        """End the `wait` in progress, or the next one, at once."""
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Send what is waiting, for half a second at most, and close all connections.

        This must not be called while another thread waits.
        """
        if self._ending.is_set():
            return
        self._ending.set()
        self._recheck()
        self._thread.join()
        with self._receiving, self._lock:
            self._is_closed = True
            self._free(CLOSE_SECONDS)

    def _do(self, command: Callable[[], None]) -> None:
        """Run a command on the calling thread, because another thread would cost a switch."""
        with self._lock:
            if self._is_closed:
                return
            self._reset_if_frozen()
            command()
            self._endpoints.perform_actions()
            if self._connections.events:
                self._recheck()

    def _recheck(self) -> None:
        os.eventfd_write(self._recheck_fd, 1)

    # Called by one loop

    def wait(self, seconds: float | None = None) -> None:
        """Receive what has arrived, or wait for it: at most `seconds`, or until `wake`."""
        self._endpoints.turn += 1
        if self._endpoints.has_paused:
            with self._lock:
                self._endpoints.resume()
                if self._connections.events:
                    self._recheck()
        self._is_waiting = True
        descriptors = [descriptor for descriptor, _ in self._waiter.poll(seconds)]
        self._is_waiting = False
        self._has_waited = True
        if self._wake_fd in descriptors:
            os.eventfd_read(self._wake_fd)
        self._receive(self._poll(0.0))

    def fileno(self) -> int:
        """Return a descriptor that is readable when `wait` would return at once."""
        return self._waiter.fileno()

    def _poll(self, seconds: float) -> list[int]:
        """Wait for descriptors, and return those that can be read."""
        return [descriptor for descriptor, _ in self._poller.poll(seconds)]

    # The I/O thread

    def _run_io_thread(self) -> None:
        try:
            while not self._ending.is_set():
                if self._receive_and_beat():
                    self.wake()
        except Exception:  # noqa: BLE001  the outermost loop of this thread: a process that cannot talk must not look alive
            self._log.exception("the connections failed")
            os._exit(EXIT_FAILED)

    def _receive_and_beat(self) -> bool:
        """Wait until a message or the next heartbeat; return whether events were reported."""
        pause = self._connections.seconds_until_heartbeat()
        if self._is_waiting or self._has_waited:
            self._has_waited = False
            self._ending.wait(pause)
            pause = 0.0
        reported = self._receive(self._poll(pause))
        if self._connections.seconds_until_heartbeat() == 0.0:
            with self._lock:
                self._endpoints.heartbeat()
                self._connections.heartbeat()
                self._endpoints.perform_actions()
            reported |= self._receive([])
        return reported

    # The thread that receives

    def _receive(self, descriptors: list[int]) -> bool:
        """Receive from these descriptors, and report what happened; return whether anything did."""
        with self._receiving:
            with self._lock:
                self._reset_if_frozen()
                for descriptor in descriptors:
                    self._read(descriptor)
                self._endpoints.continue_streams()
                self._connections.mark_active()
                events = self._connections.take_events()
            # Outside the lock, because a callback may want to send.
            for event in events:
                self._on_event(event)
        return bool(events)

    # Under the lock

    def _reset_if_frozen(self) -> None:
        if self._connections.reset_if_frozen():
            self._endpoints.perform_actions()

    def _read(self, descriptor: int) -> None:
        if descriptor == self._recheck_fd:
            with suppress(BlockingIOError):  # the other thread was woken, too, and has read it
                os.eventfd_read(self._recheck_fd)
        else:
            self._endpoints.read(descriptor)

    def _send(self, peer_id: str, message: Message, frames: list[Buffer]) -> None:
        if self._connections.may_send(peer_id, message):
            self._endpoints.send(peer_id, frames)
        else:
            self._log.debug(
                "dropped a message to a peer that is gone, or does not handle it",
                peer=peer_id,
                name=type(message).__name__,
            )

    def _free(self, seconds: float) -> None:
        """Close everything; what is not sent within `seconds` is dropped."""
        self._endpoints.close(seconds)
        self._waiter.close()
        self._poller.close()
        os.close(self._recheck_fd)
        os.close(self._wake_fd)
