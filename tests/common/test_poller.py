"""Sockets that have something are found, whatever was done with them before."""

import os
import select
import time
from collections.abc import Iterator

import pytest
import zmq

from common.poller import Poller

Pair = tuple[zmq.Socket[bytes], zmq.Socket[bytes]]
LONG = 30.0


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def pair(context: zmq.Context[zmq.Socket[bytes]]) -> Pair:
    """Two connected sockets; the first is the one that is watched."""
    near = context.socket(zmq.PAIR)
    far = context.socket(zmq.PAIR)
    port = far.bind_to_random_port("tcp://127.0.0.1")
    near.connect(f"tcp://127.0.0.1:{port}")
    far.send(b"hello")
    assert near.recv() == b"hello"
    return near, far


@pytest.fixture
def poller(pair: Pair) -> Iterator[Poller]:
    poller = Poller()
    poller.register(pair[0])
    assert poll(poller, 0) == []
    yield poller
    poller.close()


def poll(poller: Poller, seconds: float) -> list[object]:
    return poller.ready(poller.wait(0 if poller.has_missed() else seconds))


def read_all(socket: zmq.Socket[bytes]) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(socket.recv(zmq.DONTWAIT))
        except zmq.Again:
            return found


def test_a_message_wakes_and_what_was_read_does_not(pair: Pair, poller: Poller) -> None:
    near, far = pair
    far.send(b"1")
    assert poll(poller, LONG) == [near]
    assert read_all(near) == [b"1"]
    assert poll(poller, 0) == []


def test_what_arrived_before_it_was_watched_is_found(pair: Pair) -> None:
    near, far = pair
    far.send(b"1")
    assert near.poll(int(1000 * LONG)) and near.getsockopt(zmq.EVENTS) & zmq.POLLIN
    poller = Poller()
    poller.register(near)
    assert poll(poller, LONG) == [near]
    poller.close()


def test_nothing_is_waited_for_longer_than_asked(poller: Poller) -> None:
    began = time.monotonic()
    assert poll(poller, 0.01) == []
    assert time.monotonic() - began >= 0.009


def test_news_that_sending_took_from_the_descriptor_are_found(pair: Pair, poller: Poller) -> None:
    near, far = pair
    far.send(b"1")
    descriptor = near.getsockopt(zmq.FD)
    assert select.select([descriptor], [], [], LONG)[0]
    while select.select([descriptor], [], [], 0)[
        0
    ]:  # ZeroMQ looks at its news only now and then while it sends
        near.send(b"x")
        far.recv()
    poller.used(near)
    assert poll(poller, LONG) == [near]


def test_a_plain_descriptor_is_told_until_it_is_read(pair: Pair, poller: Poller) -> None:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    poller.register(descriptor)
    os.eventfd_write(descriptor, 1)
    assert poll(poller, LONG) == poll(poller, LONG) == [descriptor]
    os.eventfd_read(descriptor)
    assert poll(poller, 0) == []
    os.close(descriptor)


def test_a_socket_is_told_once_though_it_was_used_and_has_news(pair: Pair, poller: Poller) -> None:
    near, far = pair
    far.send(b"1")
    assert select.select([near.getsockopt(zmq.FD)], [], [], LONG)[0]
    poller.used(near)
    assert poll(poller, LONG) == [near]


def test_one_that_is_left_is_told_no_more(pair: Pair, poller: Poller) -> None:
    near, far = pair
    poller.used(near)
    poller.unregister(near)
    far.send(b"1")
    assert select.select([near.getsockopt(zmq.FD)], [], [], LONG)[0]
    assert poll(poller, 0) == []
