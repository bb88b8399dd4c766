"""Attacks on the gRPC API with many connections, or with many health watches."""

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from common.errors import Exhausted
from common.grpc_server import max_connections
from services.gateway.fair_share import FairShare
from services.gateway.grpc_connections import ConnectionShares
from services.gateway.kernel import ReceivedBytes
from services.gateway.readiness import MAX_WATCHES, MAX_WATCHES_PER_CONNECTION, Watches


class Server:
    """A port with the connections of some clients, all in this process."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.socket())
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(100)
        self.address = self._listener.getsockname()

    def connect(self, host: str) -> socket.socket:
        client = self._stack.enter_context(socket.socket())
        client.settimeout(10)
        client.bind((host, 0))
        client.connect(self.address)
        self._stack.enter_context(self._listener.accept()[0])
        return client


@pytest.fixture
def server() -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(stack)


def is_open(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True


def test_only_the_connections_of_a_client_that_has_too_many_are_closed(server: Server) -> None:
    greedy = [server.connect("127.0.0.1") for _ in range(30)]
    modest = [server.connect("127.0.0.2") for _ in range(2)]
    ConnectionShares(server.address[1], most=20).check()
    assert [is_open(client) for client in greedy] == [True] * 9 + [False] * 21
    assert all(map(is_open, modest))


def test_connections_of_other_ports_are_not_closed(server: Server) -> None:
    clients = [server.connect("127.0.0.1") for _ in range(30)]
    ConnectionShares(1, most=20).check()
    assert all(map(is_open, clients))


def test_the_bytes_of_a_connection_are_those_that_the_kernel_counted(server: Server) -> None:
    client = server.connect("127.0.0.2")
    peer = f"ipv4:127.0.0.2:{client.getsockname()[1]}"
    received = ReceivedBytes()
    assert received.known(peer) is None
    received.find({peer})
    assert received.known(peer) == 0
    client.sendall(b"x" * 1000)
    while received.known(peer) != 1000:
        pass  # loopback delivers at once, or nearly so
    assert received.known("ipv4:127.0.0.2:1") is None
    assert received.known("unix:") is None


def test_connections_are_found_without_a_descriptor_to_spare(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.connect("127.0.0.2")
    peer = f"ipv4:127.0.0.2:{client.getsockname()[1]}"

    def no_descriptor(_path: str) -> list[str]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("os.listdir", no_descriptor)
    received = ReceivedBytes()
    received.find({peer})
    assert received.known(peer) == 0


def test_a_server_leaves_most_descriptors_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _kind: (256, 256))
    assert max_connections() == 64


def test_what_one_client_takes_does_not_refuse_another() -> None:
    share = FairShare(100, "full")
    with pytest.raises(Exhausted):
        for _ in range(100):
            share.take("a")
    for _ in range(25):
        share.take("b")
    share.take("c")
    for _ in range(50):
        share.put_back("a")
    for _ in range(25):
        share.put_back("b")
    share.put_back("c")
    assert not share._shares._held and share._shares.num_held == 0


async def test_watches_are_limited_and_share_one_timer() -> None:
    asked = 0

    def unready_reason() -> str:
        nonlocal asked
        asked += 1
        return "starting"

    watches = Watches(unready_reason)
    with ExitStack() as stack:
        with pytest.raises(Exhausted):
            for n in range(MAX_WATCHES):
                peer = f"ipv4:127.0.0.1:{n // MAX_WATCHES_PER_CONNECTION}"
                stack.enter_context(watches.opened(peer))
        stack.enter_context(watches.opened("ipv4:127.0.0.2:1"))
        asked = 0
        watches._poll()
        assert asked == 1
        changed = watches.changed
        assert not changed.is_set()
        watches._is_ready = lambda: True
        watches._poll()
        assert changed.is_set() and not watches.changed.is_set()
    watches._poll()
    timer: Any = watches._timer
    assert timer is None
    await asyncio.sleep(0)
