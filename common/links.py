"""The ZeroMQ side of a process: one I/O thread that waits and receives, and one lock under which whoever has something sends it.

A process has at most one inbox (ROUTER, bound) and a connection (DEALER) to each peer that it gives work to; both directions
of a hop use the one connection. Both ends say Hello first, which checks protocol version and model fingerprint, then Beat
every second: whoever is silent for LEASE_SECONDS is dead. The connecting end also sees a death at once, by the broken
connection; it never reconnects a socket, it makes a new one, so no message survives into another life.

What happens comes out as events (Up, Down, Draining, Received) through a callback on the I/O thread; it must only hand them on.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from common import messages
from common.logs import get_logger
from common.messages import HOPS, PROTOCOL_VERSION, Beat, Goodbye, Hello, Peer
from common.poller import Poller
from common.process import EXIT_FAILED, CannotStart
from common.progress import Progress
from common.sockets import address_of, new_socket, receive_frames
from common.wire import Buffer, WireError, decode, encode

BEAT_SECONDS = 1.0
LEASE_SECONDS = 3.0
CLOSE_LINGER_MS = 500
NEVER_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Up:
    """`address` is empty where the peer connected to us."""

    peer_id: str
    role: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class Down:
    peer_id: str
    role: str
    reason: str


@dataclass(frozen=True, slots=True)
class Draining:
    """The peer takes nothing new and leaves when it holds nothing any more."""

    peer_id: str
    role: str


@dataclass(frozen=True, slots=True)
class Received:
    peer_id: str
    role: str
    message: Any


Event = Up | Down | Draining | Received


@dataclass(slots=True)
class Remote:
    """One peer as the I/O thread knows it. `socket` is the DEALER that was made for it; None where the peer connected to the inbox."""

    id: str
    role: str
    address: str = ""
    socket: zmq.Socket[bytes] | None = None
    monitor: zmq.Socket[bytes] | None = None
    up: bool = False
    seen: float = field(default_factory=time.monotonic)


class Links:
    """All connections of this process. `connect`, `send` and `close` may be called from any thread; after `close` they do nothing."""

    def __init__(self, me: Hello, listen: str, advertise: str, on_event: Callable[[Event], None], progress: Progress | None = None) -> None:
        self._me, self._on_event = me, on_event
        self._progress = progress or Progress()
        self._context = zmq.Context()
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = Poller()
        self._poller.register(self._wake)
        self._remotes: dict[str, Remote] = {}
        self._by_socket: dict[Any, tuple[Remote, zmq.Socket[bytes], bool]] = {}
        self._offered: list[tuple[Peer, str]] = []
        self._news: list[Event] = []
        self._draining = self._closing = self._closed = False
        self._lock = threading.RLock()
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
        """Connect to these and, where a connection breaks, try again every second. Others' connections stay as they are."""
        self._do(lambda: self._offer(offered))

    def send(self, peer_id: str, message: msgspec.Struct) -> None:
        """To a connected peer; what is sent to any other is dropped, as it would be by the peer's death a moment later."""
        frames = encode(message)
        self._do(lambda: self._send(peer_id, frames))

    def tell_draining(self) -> None:
        """To all that are connected to the inbox, and to those that connect from now on."""
        self._do(self._tell_draining)

    def close(self) -> None:
        """Sends what is waiting, for half a second at most."""
        self._do(self._stop)
        self._thread.join()

    def _do(self, command: Callable[[], None]) -> None:
        """By the calling thread: a switch to the I/O thread and back costs more than all the rest of a message."""
        with self._lock:
            if self._closed:
                return
            if self._commands or time.monotonic() - self._done > LEASE_SECONDS:
                self._commands.append(command)  # we were frozen: the I/O thread begins anew first
            else:
                command()
            if self._commands or self._news or self._closing or self._poller.has_missed():
                os.eventfd_write(self._wake, 1)

    # Under the lock, most of it on the I/O thread

    def _live(self) -> None:
        try:
            self._run()
        except Exception:  # noqa: BLE001  the outermost loop of this thread: a process that cannot talk must not look alive
            self._log.exception("the connections failed")
            os._exit(EXIT_FAILED)

    def _run(self) -> None:
        next_beat, pause = self._done + BEAT_SECONDS, 0.0
        while not self._closing:
            numbers = self._poller.wait(pause)
            with self._lock:
                self._take_turn(numbers)
                now = time.monotonic()
                if now >= next_beat:
                    # After a pause of this process (frozen, starved) the others' beats still lie unread: judge at the next one.
                    self._beat(judge=now - next_beat < BEAT_SECONDS)
                    self._offer(self._offered)
                    next_beat = now + BEAT_SECONDS
                self._done = time.monotonic()
                pause = 0.0 if self._poller.has_missed() else max(0.0, next_beat - self._done)
                news, self._news = self._news, []
            # Not before: who hears of a message at once wants to send, for which it needs the lock.
            for event in news:
                self._on_event(event)
        with self._lock:
            self._closed = True
            self._poller.close()
            os.close(self._wake)
            self._context.destroy(linger=CLOSE_LINGER_MS)

    def _take_turn(self, numbers: list[int]) -> None:
        """What came on these descriptors."""
        self._progress.watch()
        if time.monotonic() - self._done > LEASE_SECONDS:
            self._begin_anew()
        for source in self._poller.ready(numbers):
            self._handle(source)
        self._run_commands()

    def _begin_anew(self) -> None:
        """This process was frozen beyond its lease: the others went on without it, and what they sent before is stale."""
        self._log.warning("was frozen beyond its lease, begins anew")
        for remote in list(self._remotes.values()):
            self._down(remote, "this process was frozen beyond its lease")

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _handle(self, source: Any) -> None:
        if source == self._wake:
            os.eventfd_read(self._wake)
        elif self._inbox is not None and source is self._inbox:
            self._drain(self._inbox, self._receive_at_inbox)
        elif source in self._by_socket:
            remote, dealer, is_monitor = self._by_socket[source]
            # What arrived before the connection broke is read first.
            self._drain(dealer, lambda frames: self._receive(remote, frames))
            if is_monitor and self._remotes.get(remote.id) is remote:
                self._down(remote, "its connection broke: the process ended or cannot be reached")

    def _drain(self, socket: zmq.Socket[bytes], receive: Callable[[list[Buffer]], None]) -> None:
        while not socket.closed:
            try:
                frames = receive_frames(socket)
            except zmq.Again:
                return
            receive([frame.buffer for frame in frames])

    def _receive_at_inbox(self, frames: list[Buffer]) -> None:
        peer_id, frames = bytes(frames[0]).decode(errors="replace"), frames[1:]
        remote = self._remotes.get(peer_id)
        if remote is None or is_hello(frames):
            self._greet(peer_id, frames)
        else:
            self._receive(remote, frames)

    def _greet(self, peer_id: str, frames: list[Buffer]) -> None:
        """A new connection to the inbox. One that does not begin with a fitting Hello is told why and left alone."""
        try:
            hello = decode(frames, Hello)
            reason = self._objection(hello)
        except WireError as e:
            hello, reason = None, f"say Hello first, your lease ended or never began ({e})"
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
        self._news.append(Up(peer_id, hello.role))

    def _objection(self, hello: Hello) -> str:
        if self._progress.is_hung():
            return hung(self._progress.age())
        if hello.protocol_version != self._me.protocol_version:
            return f"protocol version {hello.protocol_version} against {self._me.protocol_version}: run services of one release"
        if (hello.role, self._me.role) not in HOPS:
            return f"a {hello.role} has nothing to say to a {self._me.role}"
        if hello.fingerprint and self._me.fingerprint and hello.fingerprint != self._me.fingerprint:
            return f"model fingerprint {hello.fingerprint} against {self._me.fingerprint}: both must serve the same model directory"
        return ""

    def _receive(self, remote: Remote, frames: list[Buffer]) -> None:
        try:
            message = decode(frames, HOPS[remote.role, self._me.role])
        except WireError as e:
            self._log.error("dropped a peer that sent what is no message", peer=remote.id, reason=str(e))
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
                self._news.append(Draining(remote.id, remote.role))
            case Hello() if remote.socket is not None:
                self._welcomed(remote, message)
            case _:
                self._news.append(Received(remote.id, remote.role, message))

    def _welcomed(self, remote: Remote, hello: Hello) -> None:
        reason = self._objection(hello)
        if reason or hello.id != remote.id:
            self._log.error("left a peer", peer=remote.id, reason=reason or f"another answers in its place: {hello.id}")
            self._down(remote, reason or "another process has its address")
        elif not remote.up:
            remote.up = True
            self._news.append(Up(remote.id, remote.role, remote.address))

    def _connect(self, peer: Peer, role: str) -> None:
        if peer.id in self._remotes:
            return
        socket = new_socket(self._context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._me.id.encode())
        # A broken connection is a death, and a new one is a new life: see the module's docstring. Not -1, which means never, but
        # with which a break discards what arrived and is not read yet, and makes sending fail.
        socket.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
        lost = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
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
        socket.send_multipart(encode(self._me))
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
            remote.socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
            self._poller.used(remote.socket)
        else:
            self._send_at_inbox(peer_id, frames)

    def _send_at_inbox(self, peer_id: str, frames: list[Buffer]) -> None:
        assert self._inbox is not None
        self._poller.used(self._inbox)
        try:
            self._inbox.send_multipart([peer_id.encode(), *frames], zmq.DONTWAIT, copy=False)
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
        self._news.append(Down(remote.id, remote.role, reason))

    def _beat(self, judge: bool) -> None:
        now, beat = time.monotonic(), encode(Beat(hung_seconds=self._progress.age() if self._progress.is_hung() else 0.0))
        for remote in list(self._remotes.values()):
            if judge and now - remote.seen > LEASE_SECONDS:
                self._down(remote, f"no sign of life for {LEASE_SECONDS:.0f} s")
            else:
                self._send(remote.id, beat)

    def _bind(self, listen: str) -> zmq.Socket[bytes]:
        socket = new_socket(self._context, zmq.ROUTER)
        # Without the first a message to a peer that is gone is dropped in silence; the second lets a peer connect anew.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            socket.bind(listen)
        except zmq.ZMQError as e:
            self._poller.close()
            self._context.destroy(linger=0)
            os.close(self._wake)
            raise CannotStart(f"cannot listen on {listen} ({e.strerror}): free it, or give another --listen") from e
        self._poller.register(socket)
        return socket

    def _stop(self) -> None:
        self._closing = True


def hung(seconds: float) -> str:
    return f"hung: its work loop made no progress for {seconds:.0f} s"


def is_hello(frames: list[Buffer]) -> bool:
    """A peer that connects anew under its old id begins with Hello; nothing else is as short and decodes as one."""
    if len(frames) > 1 or bytes(frames[0][: len(HELLO_START)]) != HELLO_START:
        return False
    try:
        return isinstance(decode(frames, Hello), Hello)
    except WireError:
        return False


def hello(member_id: str, role: str, fingerprint: str = "") -> Hello:
    return Hello(protocol_version=PROTOCOL_VERSION, id=member_id, role=role, fingerprint=fingerprint)


HELLO_START = bytes(encode(hello("", ""))[0][:12])
"""How its header begins: with the number of its fields, and its type."""
