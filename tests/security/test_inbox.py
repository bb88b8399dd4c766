"""What strangers and peers do at an inbox takes bounded memory and time, and nobody's place."""

import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
import structlog

from common import connections, endpoints
from common.events import Event, PeerDown, PeerUp, Received
from common.hello import hello
from common.hops import MAX_TENSOR_BYTES
from common.links import Links
from common.messages import Abort, Beat, Grant, Message, Peer, Pixels
from common.sockets import tcp_target
from common.wire import Tensor, decode, encode
from common.zmtp import LONG, MORE, Decoder, introduction, pack

DEADLINE = 30.0
MIB = 2**20
ABORT = Abort(request_id="r", attempt=1)


class Member:
    """A member with its events."""

    def __init__(self, member_id: str, role: str, listen: str = "") -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.links: Links[Any] = Links(hello(member_id, role), listen, "", self.events.put)
        self.peer = Peer(member_id, self.links.address)

    def expect(self, kind: type[Any]) -> Any:
        event = self.events.get(timeout=DEADLINE)
        assert isinstance(event, kind), event
        return event

    def connect(self, other: "Member", role: str) -> None:
        self.links.connect(other.peer, role)


class Attacker:
    """A raw connection to an inbox, which can send any bytes."""

    def __init__(self, victim: Member) -> None:
        self.socket = socket.create_connection(tcp_target(victim.peer.address), DEADLINE)
        self.decoder = Decoder()
        self.socket.sendall(introduction("DEALER", ""))

    def send(self, message: Message) -> None:
        self.socket.sendall(b"".join(pack(encode(message))))

    def flood(self, piece: bytes, times: int) -> int:
        """Send a piece again and again; return how many bytes the victim has taken."""
        num_sent = 0
        try:
            for _ in range(times):
                self.socket.sendall(piece)
                num_sent += len(piece)
        except OSError:
            pass
        return num_sent

    def receive(self, union: Any) -> Any:
        while (frames := self.decoder.next_message()) is None:
            data = self.socket.recv(65536)
            if not data:
                return None
            self.decoder.feed(data)
        return decode(frames, union)

    def wait_until_cut_off(self) -> None:
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass

    def close(self) -> None:
        self.socket.close()


Make = Callable[..., Member]


@pytest.fixture
def member() -> Iterator[Make]:
    made: list[Member] = []

    def make(member_id: str, role: str, listen: str = "tcp://127.0.0.1:*") -> Member:
        made.append(Member(member_id, role, listen))
        return made[-1]

    yield make
    for each in made:
        each.links.close()


@pytest.fixture
def vision(member: Make) -> Member:
    return member("v", "vision")


@pytest.fixture
def attack() -> Iterator[Callable[[Member], Attacker]]:
    made: list[Attacker] = []

    def make(victim: Member) -> Attacker:
        made.append(Attacker(victim))
        return made[-1]

    yield make
    for each in made:
        each.close()


Attack = Callable[[Member], Attacker]


def serves(vision: Member, member: Make) -> None:
    """Check that another member can connect to and talk to the victim."""
    preprocess = member("innocent", "preprocess", "")
    preprocess.connect(vision, "vision")
    preprocess.expect(PeerUp)
    preprocess.links.send("v", ABORT)
    while not isinstance(vision.events.get(timeout=DEADLINE), Received):
        pass


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def long_start(flags: int, size: int) -> bytes:
    return bytes([flags | LONG]) + size.to_bytes(8, "big")


# Before Hello

FLOODS = {
    "one huge frame": (long_start(0, 500 * MIB), bytes(MIB)),
    "a message without an end": (b"", long_start(MORE, MIB) + bytes(MIB)),
    "a message of tiny frames without an end": (b"", (bytes([MORE, 1]) + b"x") * 2**18),
    "a Hello with a huge tensor": (bytes([MORE, 1]) + b"h", long_start(MORE, MIB) + bytes(MIB)),
    "no message at all": (b"", bytes([4, 0]) * 2**19),
}


@pytest.mark.parametrize("start, piece", FLOODS.values(), ids=FLOODS)
def test_a_stranger_makes_the_inbox_hold_64_kib_at_most(
    vision: Member, member: Make, attack: Attack, start: bytes, piece: bytes
) -> None:
    before = resident_bytes()
    attackers = [attack(vision) for _ in range(8)]
    for attacker in attackers:
        attacker.socket.sendall(start)
        attacker.flood(piece, 60)
    grown = resident_bytes() - before
    for attacker in attackers:
        attacker.wait_until_cut_off()
    assert grown < 16 * MIB
    serves(vision, member)


def test_a_stranger_is_read_up_to_64_kib(vision: Member, attack: Attack) -> None:
    with structlog.testing.capture_logs() as logs:
        attacker = attack(vision)
        attacker.flood(long_start(0, 64 * 1024) + bytes(64 * 1024), 1)
        attacker.wait_until_cut_off()
    assert [line["reason"] for line in logs] == ["it sent 65536 bytes without a Hello"]


def test_a_stranger_that_says_no_hello_is_cut_off(
    vision: Member, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert endpoints.STRANGER_SECONDS == 5.0
    monkeypatch.setattr(endpoints, "STRANGER_SECONDS", 0.2)
    monkeypatch.setattr(connections, "BEAT_SECONDS", 0.1)
    attack(vision).wait_until_cut_off()


def test_silent_connections_do_not_keep_members_out(
    vision: Member, member: Make, attack: Attack
) -> None:
    for _ in range(2 * endpoints.MAX_STRANGERS):
        attack(vision)
    serves(vision, member)
    assert len(vision.links._endpoints._strangers) <= endpoints.MAX_STRANGERS


def test_messages_without_hello_end_their_connection_at_the_first(
    vision: Member, member: Make, attack: Attack
) -> None:
    with structlog.testing.capture_logs() as logs:
        attacker = attack(vision)
        attacker.flood(b"".join(pack(encode(ABORT))) * 1000, 100)
        attacker.wait_until_cut_off()
    assert len(logs) == 1
    serves(vision, member)


# Ids


def test_a_second_connection_takes_neither_the_place_nor_the_messages_of_a_peer(
    vision: Member, member: Make, attack: Attack
) -> None:
    preprocess = member("p", "preprocess", "")
    preprocess.connect(vision, "vision")
    preprocess.expect(PeerUp)
    vision.expect(PeerUp)
    thief = attack(vision)
    thief.send(hello("p", "preprocess"))
    thief.send(ABORT)
    another = attack(vision)
    another.send(hello("p", "preprocess"))
    assert "waits for this id" in another.receive(connections.Goodbye).reason
    vision.links.send("p", Grant(request_id="r", attempt=1, item=0))
    preprocess.expect(Received)
    preprocess.links.send("v", Abort(request_id="real", attempt=1))
    assert vision.expect(Received).message.request_id == "real"
    assert vision.events.empty()


def test_a_stranger_is_not_the_member_that_a_process_connects_to(
    member: Make, attack: Attack
) -> None:
    follower = member("llm-1", "llm")
    leader = member("llm-0", "llm")
    thief = attack(leader)
    thief.send(hello("llm-1", "llm"))
    assert leader.expect(PeerUp).peer_id == "llm-1"
    leader.connect(follower, "llm")
    assert leader.expect(PeerDown).reason == connections.OWN_CONNECTION
    assert leader.expect(PeerUp) == PeerUp("llm-1", "llm", follower.peer.address)
    late = attack(leader)
    late.send(hello("llm-1", "llm"))
    assert late.receive(connections.Goodbye).reason == connections.OWN_CONNECTION
    assert leader.events.empty()


# After Hello


def test_a_message_without_an_end_is_cut_off_at_the_limit_of_its_hop(
    vision: Member, member: Make, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_TENSOR_BYTES, ("preprocess", "vision"), 4 * MIB)
    attacker = attack(vision)
    attacker.send(hello("p", "preprocess"))
    vision.expect(PeerUp)
    before = resident_bytes()
    attacker.socket.sendall(bytes([MORE, 1]) + b"h")
    attacker.flood(long_start(MORE, MIB) + bytes(MIB), 200)
    attacker.wait_until_cut_off()
    assert resident_bytes() - before < 32 * MIB
    assert "bytes of tensors" in vision.expect(PeerDown).reason
    serves(vision, member)


def test_a_peer_is_not_read_while_the_loop_has_not_handled_what_came_before(
    vision: Member, member: Make, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "MAX_EARLY_BYTES", 4 * MIB)
    monkeypatch.setattr(connections, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(connections, "LEASE_SECONDS", 0.5)
    vision.links.wait(0.0)  # from now on the loop has work
    pixels = Pixels(request_id="r", attempt=1, item=0, patches=Tensor.of_bytes(bytes(MIB)))
    piece = b"".join(pack(encode(pixels)))
    attacker = attack(vision)
    attacker.send(hello("p", "preprocess"))
    sending = threading.Thread(target=attacker.flood, args=(piece, 100))
    sending.start()
    links = vision.links
    while not links._endpoints.has_paused:
        assert sending.is_alive()
        time.sleep(0.01)
    serves(vision, member)  # others are read meanwhile
    connection = links._connections._connections["p"]
    last_seen = connection.last_seen
    ends = time.monotonic() + DEADLINE
    while connection.last_seen == last_seen:
        assert time.monotonic() < ends
        time.sleep(0.01)
    num_early = vision.events.qsize()
    assert num_early < 8
    ends = time.monotonic() + DEADLINE
    num_received = 0
    while (sending.is_alive() or num_received < 90) and time.monotonic() < ends:
        links.wait(0.1)
        while not vision.events.empty():
            event = vision.events.get()
            assert not isinstance(event, PeerDown), "a peer that must wait keeps its lease"
            num_received += isinstance(event, Received)
    sending.join()
    assert num_received >= 90


def test_a_flood_of_one_peer_does_not_starve_the_others(
    vision: Member, member: Make, attack: Attack
) -> None:
    attacker = attack(vision)
    attacker.send(hello("p", "preprocess"))
    is_over = threading.Event()

    def flood() -> None:
        piece = b"".join(pack(encode(Beat()))) * 1000
        while not is_over.is_set():
            attacker.flood(piece, 1)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        serves(vision, member)
    finally:
        is_over.set()
        flooding.join()


def test_a_peer_that_reads_nothing_is_dropped_when_too_much_waits_for_it(
    vision: Member, member: Make, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.streams.MAX_BACKLOG_BYTES", MIB)
    attacker = attack(vision)
    attacker.send(hello("p", "preprocess"))
    vision.expect(PeerUp)
    grant = Grant(request_id="r" * 200, attempt=1, item=0)
    while vision.events.empty():
        vision.links.send("p", grant)
    assert "does not read" in vision.expect(PeerDown).reason
    serves(vision, member)


# Descriptors


def test_a_process_without_free_descriptors_goes_on_and_accepts_again(
    vision: Member, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BEAT_SECONDS", 0.05)
    preprocess = Member("p", "preprocess")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = [socket.socket() for _ in range(3)]
    taken: list[int] = []
    try:
        with structlog.testing.capture_logs() as logs:
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for each in waiting:
                each.connect(tcp_target(vision.peer.address))
            preprocess.connect(vision, "vision")
            assert "open files" in preprocess.expect(PeerDown).reason
            ends = time.monotonic() + DEADLINE
            while not any(line["event"] == "cannot accept connections" for line in logs):
                assert time.monotonic() < ends
                time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        preprocess.connect(vision, "vision")
        preprocess.expect(PeerUp)
        vision.expect(PeerUp)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)
        for each in waiting:
            each.close()
        preprocess.links.close()


@pytest.mark.parametrize(
    "address", ["ipc://relative", "inproc://x", "pgm://x", "file:///etc/passwd"]
)
def test_a_message_cannot_make_a_member_connect_to_anything_but_an_inbox(
    member: Make, address: str
) -> None:
    vision = member("v", "vision")
    vision.links.connect(Peer("l", address), "llm")
    assert "is neither tcp://HOST:PORT nor ipc:///PATH" in vision.expect(PeerDown).reason


def test_messages_cannot_make_a_member_open_connections_without_end(
    member: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_OTHER_PEERS", 8)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        vision = member("v", "vision")
        for n in range(100):
            vision.links.connect(Peer(f"l-{n}", f"tcp://127.0.0.1:{port}"), "llm")
        assert vision.expect(PeerDown) == PeerDown("l-8", "llm", connections.TOO_MANY)
