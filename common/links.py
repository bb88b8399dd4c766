"""The ZeroMQ side of a process: its work loop waits and receives where it can, an I/O thread where
it cannot, and whoever has something to send does so itself.

A process has at most one inbox (ROUTER, bound) and a connection (DEALER) to each peer that it gives
work to; both directions of a hop use the one connection. Both ends say Hello first, which checks
protocol version and model fingerprint, then Beat every second: whoever is silent for LEASE_SECONDS
is dead. The connecting end also sees a death at once, by the broken connection; it never reconnects
a socket, it makes a new one, so no message survives into another life.

A loop that waits by `wait` receives what comes without a switch between threads, which would cost
more than all the rest of a message. The I/O thread beats every second; from a second in which
nobody waited, as a unit of work takes long or nobody ever does, it waits and receives itself until
somebody waits again.

What happens comes out as events (PeerUp, PeerDown, PeerDraining, Received), in order, through a
callback on either thread; it must only hand them on.
"""

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from common import messages
from common.events import Event, PeerDown, PeerDraining, PeerUp, Received
from common.hello import is_hello
from common.logs import get_logger
from common.messages import HOPS, Beat, Goodbye, Hello, Peer
from common.poller import Poller
from common.process import EXIT_FAILED, CannotStart
from common.progress import LEASE_SECONDS, Progress
from common.sockets import address_of, has_message, new_socket, receive_frames, send_frames
from common.wire import Buffer, WireError, decode, encode

BEAT_SECONDS = 1.0
CLOSE_LINGER_MS = 500
NEVER_MS = 24 * 3600 * 1000


@dataclass(slots=True)
class Remote:
    """One peer as the I/O thread knows it. `socket` is the DEALER that was made for it; None where
    the peer connected to the inbox."""

    id: str
    role: str
    address: str = ""
    socket: zmq.Socket[bytes] | None = None
    monitor: zmq.Socket[bytes] | None = None
    up: bool = False
    seen: float = field(default_factory=time.monotonic)


class Links:
    """All connections of this process. `connect`, `send` and `close` may be called from any thread;
    after `close` they do nothing."""

    def __init__(
        self,
        me: Hello,
        listen: str,
        advertise: str,
        on_event: Callable[[Event[Any]], None],
        progress: Progress | None = None,
    ) -> None:
        self._me = me
        self._on_event = on_event
        self._progress = progress or Progress()
        self._context = zmq.Context()
        self._poller = Poller()
        self._again, self._call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        """Whoever waits is to look again; whoever calls `wait` is to return."""
        self._poller.register(self._again)
        self._waiter = select.epoll()
        for number in (self._poller.fileno(), self._call):
            self._waiter.register(number, select.EPOLLIN)
        self._waits = self._waited = False
        self._waiting_thread = 0
        self._remotes: dict[str, Remote] = {}
        self._by_socket: dict[Any, tuple[Remote, zmq.Socket[bytes], bool]] = {}
        self._offered: list[tuple[Peer, str]] = []
        self._news: list[Event[Any]] = []
        self._draining = self._closed = False
        self._lock = threading.RLock()
        self._turn = threading.Lock()
        self._ending = threading.Event()
        self._done = time.monotonic()
        self._log = get_logger().bind(member=me.id)
        self._inbox = self._bind(listen) if listen else None
        self.address = address_of(self._inbox, advertise) if self._inbox else ""
        self._thread = threading.Thread(target=self._live, name="links", daemon=True)
        self._thread.start()

    # Called by any thread

    def connect(self, peer: Peer, role: str) -> None:
        """Make a connection unless there is one. What is sent to the peer meanwhile waits in it."""
        self._do(lambda: self._connect(peer, role))

    def keep_connected(self, offered: list[tuple[Peer, str]]) -> None:
        """Connect to these and, where a connection breaks, try again every second. Others'
        connections stay as they are."""
        self._do(lambda: self._offer(offered))

    def send(self, peer_id: str, message: msgspec.Struct) -> None:
        """To a connected peer; what is sent to any other is dropped, as it would be by the peer's
        death a moment later."""
        frames = encode(message)
        self._do(lambda: self._send(peer_id, frames))

    def announce_draining(self) -> None:
        """To all that are connected to the inbox, and to those that connect from now on."""
        self._do(self._tell_draining)

    def wake(self) -> None:
        """Whoever waits in `wait`, or begins to, returns at once."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._call, 1)

    def close(self) -> None:
        """Sends what is waiting, for half a second at most. Not while another thread waits."""
        if self._ending.is_set():
            return
        self._ending.set()
        os.eventfd_write(self._again, 1)
        self._thread.join()
        with self._turn, self._lock:
            self._closed = True
            self._free(CLOSE_LINGER_MS)

    def _do(self, command: Callable[[], None]) -> None:
        """By the calling thread: a switch to another and back costs more than all the rest of a
        message."""
        with self._lock:
            if self._closed:
                return
            self._begin_anew_if_frozen()
            command()
            # Who waits itself asks before it does.
            if self._news or (
                self._waiting_thread != threading.get_ident() and self._poller.has_missed()
            ):
                os.eventfd_write(self._again, 1)

    # Called by one loop

    def wait(self, seconds: float | None = None) -> None:
        """Takes what came or comes; at most for so long, and not beyond a `wake`."""
        if seconds != 0.0:
            self._waiting_thread = threading.get_ident()
            with self._lock:
                if self._poller.has_missed():
                    seconds = 0.0
        self._waits = True
        sources = [number for number, _ in self._waiter.poll(seconds)]
        self._waits = False
        self._waited = True
        if self._call in sources:
            os.eventfd_read(self._call)
        self._take_turn(self._poller.wait(0.0))

    def fileno(self) -> int:
        """Can be read when `wait` would not wait."""
        return self._waiter.fileno()

    # The I/O thread's

    def _live(self) -> None:
        try:
            self._run()
        except Exception:  # noqa: BLE001  the outermost loop of this thread: a process that cannot talk must not look alive
            self._log.exception("the connections failed")
            os._exit(EXIT_FAILED)

    def _run(self) -> None:
        next_beat = self._done + BEAT_SECONDS
        while not self._ending.is_set():
            pause = max(0.0, next_beat - time.monotonic())
            if self._waits or self._waited:
                self._waited = False
                self._ending.wait(pause)
                pause = 0.0
            told = self._take_turn(self._poller.wait(pause))
            if (now := time.monotonic()) >= next_beat:
                # After a pause of this process (frozen, starved) the others' beats still lie
                # unread: judge at the next one.
                with self._lock:
                    self._progress.watch()
                    self._beat(judge=now - next_beat < BEAT_SECONDS)
                    self._offer(self._offered)
                next_beat = now + BEAT_SECONDS
                told |= self._take_turn([])
            if told:
                self.wake()

    # By whoever takes a turn

    def _take_turn(self, numbers: list[int]) -> bool:
        """Receives what came on these descriptors, and hands on what happened; whether anything
        did."""
        with self._turn:
            with self._lock:
                self._begin_anew_if_frozen()
                for source in self._poller.ready(numbers):
                    self._handle(source)
                self._done = time.monotonic()
                if self._waiting_thread != threading.get_ident() and self._poller.has_missed():
                    os.eventfd_write(self._again, 1)
                news = self._news
                self._news = []
            # Not under the lock: who hears of a message at once wants to send.
            for event in news:
                self._on_event(event)
        return bool(news)

    # Under the lock

    def _begin_anew_if_frozen(self) -> None:
        """Where this process was frozen beyond its lease the others went on without it, and what
        they sent before is stale."""
        if time.monotonic() - self._done <= LEASE_SECONDS:
            return
        self._done = time.monotonic()
        self._log.warning("was frozen beyond its lease, begins anew")
        for remote in list(self._remotes.values()):
            self._down(remote, "this process was frozen beyond its lease")

    def _handle(self, source: Any) -> None:
        if source == self._again:
            with suppress(BlockingIOError):  # another thread was told, too
                os.eventfd_read(self._again)
        elif self._inbox is not None and source is self._inbox:
            self._drain(self._inbox, self._receive_at_inbox)
        elif source in self._by_socket:
            remote, dealer, is_monitor = self._by_socket[source]
            if is_monitor and not has_message(source):
                return
            # What arrived before the connection broke is read first.
            self._drain(dealer, lambda frames: self._receive(remote, frames))
            if is_monitor and self._remotes.get(remote.id) is remote:
                self._down(remote, "its connection broke: the process ended or cannot be reached")

    def _drain(self, socket: zmq.Socket[bytes], receive: Callable[[list[Buffer]], None]) -> None:
        with suppress(zmq.Again):
            more = True
            while more:
                receive([frame.buffer for frame in receive_frames(socket)])
                # Asking takes half the time of an exception.
                more = not socket.closed and has_message(socket)

    def _receive_at_inbox(self, frames: list[Buffer]) -> None:
        peer_id = bytes(frames[0]).decode(errors="replace")
        frames = frames[1:]
        remote = self._remotes.get(peer_id)
        if remote is None or is_hello(frames):
            self._greet(peer_id, frames)
        else:
            self._receive(remote, frames)

    def _greet(self, peer_id: str, frames: list[Buffer]) -> None:
        """A new connection to the inbox. One that does not begin with a fitting Hello is told why
        and left alone."""
        try:
            hello = decode(frames, Hello)
            reason = self._objection(hello)
        except WireError as e:
            hello = None
            reason = f"say Hello first, your lease ended or never began ({e})"
        if hello is not None and not reason and hello.id != peer_id:
            reason = "the id in Hello is not the connection's"
        if hello is None or reason:
            self._log.warning("refused a connection", peer=peer_id, reason=reason)
            self._send_at_inbox(peer_id, encode(Goodbye(reason=reason)))
            return
        if old := self._remotes.get(peer_id):
            self._down(old, "it connected anew")
        self._remotes[peer_id] = Remote(peer_id, hello.role, up=True)
        self._send_at_inbox(peer_id, encode(self._me))
        if self._draining:
            self._send_at_inbox(peer_id, encode(messages.Draining()))
        self._news.append(PeerUp(peer_id, hello.role))

    def _objection(self, hello: Hello) -> str:
        if self._progress.is_hung():
            return hung(self._progress.age())
        if hello.protocol_version != self._me.protocol_version:
            return (
                f"protocol version {hello.protocol_version} against "
                f"{self._me.protocol_version}: run services of one release"
            )
        if (hello.role, self._me.role) not in HOPS:
            return f"a {hello.role} has nothing to say to a {self._me.role}"
        if hello.fingerprint and self._me.fingerprint and hello.fingerprint != self._me.fingerprint:
            return (
                f"model fingerprint {hello.fingerprint} against "
                f"{self._me.fingerprint}: both must serve the same model directory"
            )
        return ""

    def _receive(self, remote: Remote, frames: list[Buffer]) -> None:
        try:
            message = decode(frames, HOPS[remote.role, self._me.role])
        except WireError as e:
            self._log.error(
                "dropped a peer that sent what is no message", peer=remote.id, reason=str(e)
            )
            self._down(remote, f"it sent what is no message: {e}")
            return
        remote.seen = time.monotonic()
        match message:
            case Beat(hung_seconds=seconds):
                if seconds:
                    self._down(remote, hung(seconds))
            case Goodbye(reason=reason):
                self._down(remote, reason)
            case messages.Draining():
                self._news.append(PeerDraining(remote.id, remote.role))
            case Hello() if remote.socket is not None:
                self._welcomed(remote, message)
            case _:
                self._news.append(Received(remote.id, remote.role, message))

    def _welcomed(self, remote: Remote, hello: Hello) -> None:
        reason = self._objection(hello)
        if reason or hello.id != remote.id:
            self._log.error(
                "left a peer",
                peer=remote.id,
                reason=reason or f"another answers in its place: {hello.id}",
            )
            self._down(remote, reason or "another process has its address")
        elif not remote.up:
            remote.up = True
            self._news.append(PeerUp(remote.id, remote.role, remote.address))

    def _connect(self, peer: Peer, role: str) -> None:
        if peer.id in self._remotes:
            return
        socket = new_socket(self._context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._me.id.encode())
        # A broken connection is a death, and a new one is a new life: see the module's docstring.
        # Not -1, which means never, but with which a break discards what arrived and is not read
        # yet, and makes sending fail.
        socket.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
        lost = (
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_CLOSED
            | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        remote = Remote(peer.id, role, peer.address, socket, socket.get_monitor_socket(lost))
        self._remotes[peer.id] = remote
        for source, is_monitor in ((remote.socket, False), (remote.monitor, True)):
            self._by_socket[source] = (remote, socket, is_monitor)
            self._poller.register(source)
        try:
            socket.connect(peer.address)
        except zmq.ZMQError as e:
            self._down(remote, f"its address {peer.address!r} cannot be connected to: {e.strerror}")
            return
        send_frames(socket, encode(self._me))
        self._poller.used(socket)

    def _offer(self, offered: list[tuple[Peer, str]]) -> None:
        self._offered = offered
        for peer, role in () if self._progress.is_hung() else offered:
            self._connect(peer, role)

    def _send(self, peer_id: str, frames: list[Buffer]) -> None:
        remote = self._remotes.get(peer_id)
        if remote is None:
            self._log.debug("dropped a message to a peer that is gone", peer=peer_id)
        elif remote.socket is not None:
            send_frames(remote.socket, frames)
            self._poller.used(remote.socket)
        else:
            self._send_at_inbox(peer_id, frames)

    def _send_at_inbox(self, peer_id: str, frames: list[Buffer]) -> None:
        assert self._inbox is not None
        self._poller.used(self._inbox)
        try:
            send_frames(self._inbox, [peer_id.encode(), *frames])
        except zmq.ZMQError as e:
            # EHOSTUNREACH: the connection broke and its lease has not ended yet.
            if e.errno != zmq.EHOSTUNREACH:
                raise

    def _tell_draining(self) -> None:
        self._draining = True
        for remote in [remote for remote in self._remotes.values() if remote.socket is None]:
            self._send_at_inbox(remote.id, encode(messages.Draining()))

    def _down(self, remote: Remote, reason: str) -> None:
        del self._remotes[remote.id]
        if remote.socket is not None and remote.monitor is not None:
            for source in (remote.socket, remote.monitor):
                del self._by_socket[source]
                self._poller.unregister(source)
            remote.socket.disable_monitor()
            remote.monitor.close(linger=0)
            remote.socket.close(linger=0)
        self._news.append(PeerDown(remote.id, remote.role, reason))

    def _beat(self, judge: bool) -> None:
        now = time.monotonic()
        beat = encode(Beat(hung_seconds=self._progress.age() if self._progress.is_hung() else 0.0))
        for remote in list(self._remotes.values()):
            if judge and now - remote.seen > LEASE_SECONDS:
                self._down(remote, f"no sign of life for {LEASE_SECONDS:.0f} s")
            else:
                self._send(remote.id, beat)

    def _bind(self, listen: str) -> zmq.Socket[bytes]:
        socket = new_socket(self._context, zmq.ROUTER)
        # Without the first a message to a peer that is gone is dropped in silence; the second lets
        # a peer connect anew.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            socket.bind(listen)
        except zmq.ZMQError as e:
            self._free(linger=0)
            raise CannotStart(
                f"cannot listen on {listen} ({e.strerror}): free it, or give another --listen"
            ) from e
        self._poller.register(socket)
        return socket

    def _free(self, linger: int) -> None:
        """What is not sent after `linger` milliseconds is dropped."""
        self._waiter.close()
        self._poller.close()
        os.close(self._again)
        os.close(self._call)
        self._context.destroy(linger=linger)


def hung(seconds: float) -> str:
    return f"hung: its work loop made no progress for {seconds:.0f} s"
