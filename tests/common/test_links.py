"""Two processes over ZeroMQ greet, talk, refuse peers that do not fit, and see each other die."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import numpy as np
import pytest
import structlog
import zmq

from common import connections
from common.events import Event, PeerDown, PeerUp, Received
from common.hello import hello
from common.hops import MAX_TENSOR_BYTES
from common.links import Links
from common.messages import PROTOCOL_VERSION, Abort, Goodbye, Grant, Hello, Offer, Peer, Pixels
from common.process import CannotStart
from common.wire import MAX_HEADER_BYTES, Tensor, decode, encode

ROOT = Path(__file__).parents[2]
DEADLINE = 20.0
TCP = "tcp://127.0.0.1:*"
GRANT = Grant(request_id="r", attempt=1, item=0)
E = TypeVar("E", bound=Event)


class End:
    """One process's links and their events."""

    def __init__(self, me: Hello, listen: str = "") -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.links = Links(me, listen, "", self.events.put)
        self.peer = Peer(me.id, self.links.address)
        self.role = me.role

    def expect(self, kind: type[E], timeout: float = DEADLINE) -> E:
        """Return the next event, which must be of this kind."""
        event = self.events.get(timeout=timeout)
        assert isinstance(event, kind), event
        return event

    def stays_quiet(self, seconds: float) -> bool:
        try:
            self.events.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def connect(self, other: "End") -> None:
        self.links.connect(other.peer, other.role)

    def meet(self, other: "End") -> None:
        self.connect(other)
        assert self.expect(PeerUp).peer_id == other.peer.id
        assert other.expect(PeerUp).peer_id == self.peer.id


Make = Callable[..., End]


@pytest.fixture
def end() -> Iterator[Make]:
    made: list[End] = []

    def make(member_id: str, role: str, listen: str = "", **differing: Any) -> End:
        fields = {
            "protocol_version": PROTOCOL_VERSION,
            "id": member_id,
            "role": role,
            "fingerprint": "",
        }
        made.append(End(Hello(**fields | differing), listen))
        return made[-1]

    yield make
    for each in made:
        each.links.close()


@pytest.fixture(params=["tcp", "ipc"])
def listen(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return TCP if request.param == "tcp" else f"ipc://{tmp_path}/inbox"


@pytest.fixture
def vision(end: Make) -> End:
    return end("v", "vision", TCP)


@pytest.fixture
def preprocess(end: Make) -> End:
    return end("p", "preprocess")


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(connections, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(connections, "LEASE_SECONDS", 0.8)
    return 0.8


CHILD = """
import queue, sys
from common import connections, links
from common.hello import hello
from common.hops import MAX_TENSOR_BYTES
from common.messages import Peer

connections.BEAT_SECONDS = 0.1
role, listen, target = sys.argv[1:]
events = queue.SimpleQueue()
mine = links.Links(hello("child", role), listen, "", events.put)
print(mine.address, flush=True)
if target:
    mine.keep_connected([(Peer("v", target), "vision")])
while True:
    print(type(events.get()).__name__, flush=True)
"""


@contextmanager
def child(
    role: str, listen: str = "", target: str = ""
) -> Iterator[tuple[subprocess.Popen[str], Peer]]:
    """Start another process, which prints its address and then its events."""
    command = [sys.executable, "-c", CHILD, role, listen, target]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, Peer("child", process.stdout.readline().strip())
        finally:
            process.kill()


@contextmanager
def stranger(address: str, identity: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, int(DEADLINE * 1000))
        if identity:
            dealer.setsockopt(zmq.IDENTITY, identity)
        dealer.connect(address)
        yield dealer


def receive_from(dealer: "zmq.Socket[bytes]") -> Any:
    return decode(dealer.recv_multipart(), Hello | Goodbye)


# Talking


def test_both_ends_report_that_the_other_is_up(end: Make, listen: str) -> None:
    vision = end("v", "vision", listen)
    preprocess = end("p", "preprocess")
    preprocess.connect(vision)
    assert preprocess.expect(PeerUp) == PeerUp("v", "vision", vision.links.address)
    assert vision.expect(PeerUp) == PeerUp("p", "preprocess")


def test_messages_and_their_tensors_go_both_ways_in_order(end: Make, listen: str) -> None:
    vision = end("v", "vision", listen)
    preprocess = end("p", "preprocess")
    preprocess.meet(vision)
    patches = np.arange(3 * 2**20, dtype=np.uint8).reshape(3, -1)
    sent = [
        Pixels(request_id="r", attempt=1, item=i, patches=Tensor.of(patches[i])) for i in range(3)
    ]
    for message in sent:
        preprocess.links.send("v", message)
    assert [vision.expect(Received) for _ in sent] == [
        Received("p", "preprocess", message) for message in sent
    ]
    vision.links.send("p", GRANT)
    assert preprocess.expect(Received) == Received("v", "vision", GRANT)


def test_a_message_sent_before_the_other_end_answers_arrives(vision: End, preprocess: End) -> None:
    preprocess.connect(vision)
    preprocess.links.send("v", Abort(request_id="r", attempt=1))
    vision.expect(PeerUp)
    assert vision.expect(Received).message == Abort(request_id="r", attempt=1)


def test_a_second_connect_to_the_same_peer_changes_nothing(vision: End, preprocess: End) -> None:
    preprocess.meet(vision)
    preprocess.connect(vision)
    preprocess.links.send("v", Abort(request_id="r", attempt=1))
    vision.expect(Received)


def test_a_message_to_an_unknown_peer_is_dropped(vision: End, preprocess: End) -> None:
    preprocess.meet(vision)
    vision.links.send("nobody", GRANT)
    vision.links.send("p", GRANT)
    assert preprocess.expect(Received).message == GRANT


@pytest.mark.parametrize("size", [1, 256 * 1024])
def test_closing_sends_what_is_waiting(end: Make, listen: str, size: int) -> None:
    vision = end("v", "vision", listen)
    preprocess = end("p", "preprocess")
    preprocess.meet(vision)
    for image in range(8):
        preprocess.links.send(
            "v",
            Pixels(request_id="r", attempt=1, item=image, patches=Tensor.of_bytes(bytes(size))),
        )
    preprocess.links.close()
    assert [vision.expect(Received).message.item for _ in range(8)] == list(range(8))


def test_what_the_accepting_end_sent_before_it_closed_arrives_before_its_end(
    end: Make, listen: str
) -> None:
    vision = end("v", "vision", listen)
    preprocess = end("p", "preprocess")
    preprocess.meet(vision)
    for image in range(200):
        vision.links.send("p", Grant(request_id="r", attempt=1, item=image))
    vision.links.close()
    assert [preprocess.expect(Received).message.item for _ in range(200)] == list(range(200))
    preprocess.expect(PeerDown)


def test_after_close_every_call_does_nothing(vision: End, preprocess: End) -> None:
    preprocess.links.close()
    preprocess.connect(vision)
    preprocess.links.keep_connected([(vision.peer, "vision")])
    preprocess.links.send("v", GRANT)
    preprocess.links.close()
    assert preprocess.events.empty()


# Peers that do not fit


@pytest.mark.parametrize(
    ("of_vision", "of_other", "reason"),
    [
        ({}, {"protocol_version": PROTOCOL_VERSION + 1}, "run services of one release"),
        ({"fingerprint": "aa"}, {"fingerprint": "bb"}, "model fingerprint bb against aa"),
        ({}, {"role": "detokenizer"}, "a detokenizer has nothing to say to a vision"),
        ({}, {"role": "nonsense"}, "a nonsense has nothing to say to a vision"),
    ],
    ids=["protocol version", "fingerprint", "role", "unknown role"],
)
def test_a_peer_that_does_not_fit_gets_the_reason_which_is_logged_too(
    end: Make, of_vision: dict[str, Any], of_other: dict[str, Any], reason: str
) -> None:
    vision = end("v", "vision", TCP, **of_vision)
    misfit = encode(
        Hello(
            **{
                "protocol_version": PROTOCOL_VERSION,
                "id": "p",
                "role": "preprocess",
                "fingerprint": "",
            }
            | of_other
        )
    )
    with structlog.testing.capture_logs() as logs, stranger(vision.links.address, b"p") as dealer:
        dealer.send_multipart(misfit)
        goodbye = receive_from(dealer)
    assert isinstance(goodbye, Goodbye) and reason in goodbye.reason
    (line,) = logs
    assert (line["event"], line["log_level"], line["peer"], line["reason"]) == (
        "refused a connection",
        "warning",
        "p",
        goodbye.reason,
    )
    assert vision.events.empty()


def test_a_refused_peer_reports_a_death_with_the_reason(end: Make) -> None:
    vision = end("v", "vision", TCP, fingerprint="aa")
    preprocess = end("p", "preprocess", fingerprint="bb")
    preprocess.connect(vision)
    assert "both must serve the same model directory" in preprocess.expect(PeerDown).reason


def test_the_connecting_end_refuses_a_peer_that_does_not_fit(end: Make) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        preprocess = end("p", "preprocess", fingerprint="bb")
        preprocess.links.connect(Peer("v", f"tcp://127.0.0.1:{port}"), "vision")
        identity, *greeting = router.recv_multipart()
        assert decode(greeting, Hello).id == "p"
        router.send_multipart([identity, *encode(hello("v", "vision", "aa"))])
        assert "both must serve the same model directory" in preprocess.expect(PeerDown).reason


def test_members_that_know_no_model_fit_any(end: Make) -> None:
    preprocess = end("p", "preprocess", TCP, fingerprint="aa")
    gateway = end("g", "gateway")
    gateway.meet(preprocess)


def test_a_hello_under_a_foreign_name_is_refused(vision: End) -> None:
    with stranger(vision.links.address, b"x") as dealer:
        dealer.send_multipart(encode(hello("p", "preprocess")))
        assert receive_from(dealer) == Goodbye(reason="the id in Hello is not the connection's")


NONSENSE = [
    [b""],
    [b"", b""],
    [b"GET / HTTP/1.1\r\n\r\n"],
    [b"\xff" * (MAX_HEADER_BYTES + 1)],
    [b"\x91" * MAX_HEADER_BYTES],
    [msgpack.packb({"type": "x" * (MAX_HEADER_BYTES - 20)})],
    [msgpack.packb({"type": "Hello", "x" * (MAX_HEADER_BYTES - 40): 1})],
    [b"x"] * 500,
    encode(GRANT),
]


@pytest.mark.parametrize(
    "identity", [b"evil", b"\xff\xfe", b""], ids=["named", "no text", "unnamed"]
)
@pytest.mark.parametrize("frames", NONSENSE, ids=range(len(NONSENSE)))
def test_a_stranger_who_sends_nonsense_does_no_harm_and_is_cut_off(
    vision: End, preprocess: End, identity: bytes, frames: list[bytes]
) -> None:
    with stranger(vision.links.address, identity) as dealer:
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.send_multipart(frames)
        assert monitor.poll(DEADLINE * 1000)
        dealer.disable_monitor()
        monitor.close()
        preprocess.meet(vision)
        preprocess.links.send("v", Abort(request_id="r", attempt=1))
        vision.expect(Received)


def test_a_stranger_learns_what_it_did_wrong(vision: End) -> None:
    with stranger(vision.links.address, b"evil") as dealer:
        dealer.send_multipart(encode(GRANT))
        assert "say Hello first" in receive_from(dealer).reason


def test_a_client_of_another_protocol_does_no_harm(vision: End, preprocess: End) -> None:
    host, _, port = vision.links.address.removeprefix("tcp://").partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\n\r\n" * 100)
        preprocess.meet(vision)


def test_a_message_beyond_the_limit_of_its_hop_ends_the_connection_it_came_on(
    monkeypatch: pytest.MonkeyPatch, end: Make, preprocess: End
) -> None:
    monkeypatch.setitem(MAX_TENSOR_BYTES, ("preprocess", "vision"), 2**20)
    vision = end("v", "vision", TCP)
    preprocess.meet(vision)
    pixels = Pixels(request_id="r", attempt=1, item=0, patches=Tensor.of_bytes(bytes(2**20)))
    preprocess.links.send("v", pixels)
    assert vision.expect(Received).message == pixels
    pixels.patches = Tensor.of_bytes(bytes(2**20 + 1))
    preprocess.links.send("v", pixels)
    assert "at most 1048576 are allowed" in vision.expect(PeerDown).reason
    preprocess.expect(PeerDown)
    preprocess.meet(vision)


@pytest.mark.parametrize(
    "frames", [[b"nonsense"], encode(GRANT), [b""]], ids=["nonsense", "another hop's", "empty"]
)
def test_a_peer_that_sends_an_invalid_message_is_dropped(vision: End, frames: list[bytes]) -> None:
    with stranger(vision.links.address, b"p") as dealer:
        dealer.send_multipart(encode(hello("p", "preprocess")))
        assert receive_from(dealer).id == "v"
        vision.expect(PeerUp)
        dealer.send_multipart(frames)
        assert "invalid message" in vision.expect(PeerDown).reason


# Death and return


def test_the_death_of_the_accepting_process_is_seen_at_once(preprocess: End, listen: str) -> None:
    with child("vision", listen) as (process, peer):
        preprocess.links.connect(peer, "vision")
        preprocess.expect(PeerUp)
        process.kill()
        # The lease is longer.
        assert "its connection broke" in preprocess.expect(PeerDown, timeout=2.5).reason


def test_the_death_of_the_connecting_process_is_seen_at_once(end: Make, listen: str) -> None:
    vision = end("v", "vision", listen)
    with child("preprocess", target=vision.links.address) as (process, _):
        vision.expect(PeerUp)
        process.kill()
        # The lease is longer.
        assert "its connection broke" in vision.expect(PeerDown, timeout=2.5).reason


def test_a_peer_that_is_idle_but_alive_keeps_its_lease(short_lease: float, end: Make) -> None:
    vision = end("v", "vision", TCP)
    preprocess = end("p", "preprocess")
    preprocess.meet(vision)
    assert preprocess.stays_quiet(3 * short_lease)
    assert vision.events.empty()


def test_a_frozen_acceptor_is_dead_after_its_lease(short_lease: float, end: Make) -> None:
    preprocess = end("p", "preprocess")
    with child("vision", TCP) as (process, peer):
        preprocess.links.connect(peer, "vision")
        preprocess.expect(PeerUp)
        process.send_signal(signal.SIGSTOP)
        assert "no sign of life" in preprocess.expect(PeerDown).reason


def test_a_thawed_process_learns_that_its_lease_ended_and_comes_back(
    short_lease: float, end: Make
) -> None:
    vision = end("v", "vision", TCP)
    with child("preprocess", target=vision.links.address) as (process, _):
        vision.expect(PeerUp)
        process.send_signal(signal.SIGSTOP)
        vision.expect(PeerDown)
        process.send_signal(signal.SIGCONT)
        vision.expect(PeerUp)
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(3)] == [
            "PeerUp",
            "PeerDown",
            "PeerUp",
        ]


def test_a_process_that_comes_back_under_another_id_is_another_peer(
    end: Make, preprocess: End, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/inbox"
    for member_id in ("v-1", "v-2"):
        vision = end(member_id, "vision", address)
        preprocess.meet(vision)
        vision.links.close()
        assert preprocess.expect(PeerDown).peer_id == member_id


def test_a_connection_is_dropped_if_another_process_answers(end: Make, preprocess: End) -> None:
    vision = end("v-2", "vision", TCP)
    preprocess.links.connect(Peer("v-1", vision.links.address), "vision")
    assert preprocess.expect(PeerDown) == PeerDown(
        "v-1", "vision", "another process has its address"
    )


def test_a_peer_that_connects_again_is_admitted_once_its_former_connection_is_down(
    end: Make, vision: End
) -> None:
    before = end("p", "preprocess")
    before.meet(vision)
    again = end("p", "preprocess")
    again.connect(vision)
    before.links.close()
    assert "its connection broke" in vision.expect(PeerDown).reason
    vision.expect(PeerUp)
    vision.links.send("p", GRANT)
    again.expect(PeerUp)
    assert again.expect(Received).message == GRANT


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:1",
        "ipc:///nowhere/inbox",
        "nonsense",
        "",
        "tcp://",
        "tcp://127.0.0.1:99999",
        "inproc://inbox",
        "pgm://127.0.0.1;239.0.0.1:5000",
        "ipc://@abstract",
        "ipc:///" + "x" * 190,
    ],
)
def test_an_address_that_cannot_be_reached_is_only_a_death(
    vision: End, preprocess: End, address: str
) -> None:
    preprocess.links.connect(Peer("x", address), "vision")
    assert preprocess.expect(PeerDown).peer_id == "x"
    preprocess.meet(vision)


def test_a_kept_connection_is_made_again_when_its_peer_returns(
    monkeypatch: pytest.MonkeyPatch, end: Make, tmp_path: Path
) -> None:
    monkeypatch.setattr(connections, "BEAT_SECONDS", 0.1)
    preprocess = end("p", "preprocess")
    address = f"ipc://{tmp_path}/inbox"
    preprocess.links.keep_connected([(Peer("v", address), "vision")])
    preprocess.expect(PeerDown)
    vision = end("v", "vision", address)
    vision.expect(PeerUp)
    while isinstance(preprocess.events.get(timeout=DEADLINE), PeerDown):
        pass
    preprocess.links.send("v", Abort(request_id="r", attempt=1))
    vision.expect(Received)


def test_sending_to_a_peer_whose_death_is_not_read_yet_does_no_harm(
    end: Make, preprocess: End
) -> None:
    """The connection broke, and messages are sent before a thread reads that."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    killed = threading.Event()

    def on_event(event: Event) -> None:
        events.put(event)
        if isinstance(event, PeerUp):
            killed.wait(DEADLINE)

    links = Links(hello("p", "preprocess"), "", "", on_event)
    try:
        with child("vision", TCP) as (process, peer):
            links.connect(peer, "vision")
            assert isinstance(events.get(timeout=DEADLINE), PeerUp)
            process.kill()
            process.wait()
            for _ in range(10):
                links.send("child", Abort(request_id="r", attempt=1))
            killed.set()
            down = events.get(timeout=DEADLINE)
            assert isinstance(down, PeerDown)
            assert "its connection broke" in down.reason
    finally:
        killed.set()
        links.close()


# Open files and addresses


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_fifty_connections_leave_no_file_open(end: Make) -> None:
    before = open_files()
    for _ in range(50):
        vision = End(hello("v", "vision"), TCP)
        preprocess = End(hello("p", "preprocess"))
        preprocess.meet(vision)
        preprocess.links.close()
        vision.links.close()
    assert open_files() == before


def test_connections_that_fail_leave_no_file_open(preprocess: End) -> None:
    before = open_files()
    for _ in range(50):
        preprocess.links.connect(Peer("x", "tcp://127.0.0.1:1"), "vision")
        preprocess.expect(PeerDown)
    # The last ones may not be closed yet.
    assert open_files() < before + 25


def test_an_address_that_is_taken_is_reported(vision: End, end: Make) -> None:
    with pytest.raises(CannotStart, match=r"Address already in use.*--listen"):
        end("w", "vision", vision.links.address)


def test_the_advertised_host_replaces_the_one_listened_on() -> None:
    links = Links(hello("v", "vision"), TCP, "vision.example", lambda event: None)
    links.close()
    host, _, port = links.address.removeprefix("tcp://").partition(":")
    assert host == "vision.example" and int(port) > 0


def test_offers_arrive_whole(vision: End, preprocess: End) -> None:
    offer = Offer(
        request_id="r",
        attempt=1,
        item=0,
        mm_hash="h",
        grid_thw=(1, 4, 4),
        num_patches=16,
        llm=Peer("l", "tcp://127.0.0.1:1"),
        timeout=1.5,
    )
    preprocess.meet(vision)
    preprocess.links.send("v", offer)
    assert vision.expect(Received).message == offer
