"""Sockets that have a message are found, whatever was done with them before."""

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
    """Return two connected sockets; the first one is polled."""
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
    return poller.ready(poller.wait(0 if poller.has_unreported() else seconds))


def read_all(socket: zmq.Socket[bytes]) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(socket.recv(zmq.DONTWAIT))
        except zmq.Again:
            return found


def test_a_message_is_found_until_it_is_read(pair: Pair, poller: Poller) -> None:
    near, far = pair
    far.send(b"1")
    assert poll(poller, LONG) == [near]
    assert read_all(near) == [b"1"]
    assert poll(poller, 0) == []


def test_a_message_that_arrived_before_its_socket_was_registered_is_found(pair: Pair) -> None:
    near, far = pair
    far.send(b"1")
    assert near.poll(int(1000 * LONG)) and near.getsockopt(zmq.EVENTS) & zmq.POLLIN
    poller = Poller()
    poller.register(near)
    assert poll(poller, LONG) == [near]
    poller.close()


def test_a_wait_without_a_message_ends_in_time(poller: Poller) -> None:
    began = time.monotonic()
    assert poll(poller, 0.01) == []
    assert time.monotonic() - began >= 0.009


def test_a_message_whose_signal_was_consumed_by_sending_is_found(
    pair: Pair, poller: Poller
) -> None:
    near, far = pair
    far.send(b"1")
    descriptor = near.getsockopt(zmq.FD)
    assert select.select([descriptor], [], [], LONG)[0]
    while select.select([descriptor], [], [], 0)[
        0
    ]:  # ZeroMQ looks at its signals only now and then while it sends
        near.send(b"x")
        far.recv()
    poller.note_use(near)
    assert poll(poller, LONG) == [near]


def test_a_plain_descriptor_is_returned_until_it_is_read(pair: Pair, poller: Poller) -> None:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    poller.register(descriptor)
    os.eventfd_write(descriptor, 1)
    assert poll(poller, LONG) == poll(poller, LONG) == [descriptor]
    os.eventfd_read(descriptor)
    assert poll(poller, 0) == []
    os.close(descriptor)


def test_a_socket_is_returned_once_if_it_was_used_and_is_signalled(
    pair: Pair, poller: Poller
) -> None:
    near, far = pair
    far.send(b"1")
    assert select.select([near.getsockopt(zmq.FD)], [], [], LONG)[0]
    poller.note_use(near)
    assert poll(poller, LONG) == [near]


def test_an_unregistered_socket_is_not_returned(pair: Pair, poller: Poller) -> None:
    near, far = pair
    poller.note_use(near)
    poller.unregister(near)
    far.send(b"1")
    assert select.select([near.getsockopt(zmq.FD)], [], [], LONG)[0]
    assert poll(poller, 0) == []
