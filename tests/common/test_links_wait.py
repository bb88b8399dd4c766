"""A work loop receives while it waits, and the I/O thread receives if the loop does not wait."""

import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import connections
from common.events import PeerDown, Received
from common.hello import hello
from common.links import Links
from common.messages import Abort, Peer

DEADLINE = 60.0


class WatchedEvent(threading.Event):
    """An event that knows whether a thread has waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.is_waited_for.set()
        return super().wait(timeout)


class Vision:
    """A replica with its events and the threads that reported them, and a client that sends."""

    def __init__(self, folder: Path) -> None:
        self.events: deque[Any] = deque()
        self.threads: deque[threading.Thread] = deque()
        self.num_sent = 0
        self.links = Links(hello("v", "vision"), f"ipc://{folder}/inbox", "", self.on_event)
        self.links._ending = self.ending = WatchedEvent()
        self.client = Links(hello("p", "preprocess"), "", "", lambda event: None)
        self.client.connect(Peer("v", self.links.address), "vision")

    def on_event(self, event: Any) -> None:
        self.events.append(event)
        self.threads.append(threading.current_thread())

    def send(self) -> None:
        self.client.send("v", Abort(request_id="r", attempt=self.num_sent))
        self.num_sent += 1

    def wait_for(self, attempt: int) -> None:
        while (
            not self.events
            or getattr(getattr(self.events[-1], "message", None), "attempt", None) != attempt
        ):
            self.links.wait(DEADLINE)

    def close(self) -> None:
        self.client.close()
        self.links.close()


@pytest.fixture
def vision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vision]:
    monkeypatch.setattr(connections, "BEAT_SECONDS", 10 * DEADLINE)
    one = Vision(tmp_path)
    yield one
    one.close()


def test_from_the_first_wait_on_the_waiting_thread_receives(vision: Vision) -> None:
    vision.send()
    vision.wait_for(0)
    while not vision.ending.is_waited_for.is_set():  # the I/O thread sleeps from here on
        vision.send()
        vision.wait_for(vision.num_sent - 1)
    vision.threads.clear()
    for _ in range(50):
        vision.send()
        vision.wait_for(vision.num_sent - 1)
    assert set(vision.threads) == {threading.current_thread()}


def test_a_message_that_the_io_thread_received_ends_the_next_wait_at_once(vision: Vision) -> None:
    vision.send()
    while not any(isinstance(event, Received) for event in vision.events):
        time.sleep(0.001)
    began = time.monotonic()
    vision.links.wait(DEADLINE)
    assert vision.threads[-1] is not threading.current_thread()
    assert time.monotonic() - began < DEADLINE


def test_a_wake_ends_the_wait_in_progress_or_the_next_one(vision: Vision) -> None:
    began = time.monotonic()
    vision.links.wake()
    vision.links.wait(DEADLINE)
    waking = threading.Timer(0.01, vision.links.wake)
    waking.start()
    vision.links.wait(DEADLINE)
    waking.join()
    assert time.monotonic() - began < DEADLINE


def test_a_loop_with_a_poll_of_its_own_can_wait_for_the_descriptor(vision: Vision) -> None:
    descriptor = select.poll()
    descriptor.register(vision.links.fileno(), select.POLLIN)
    vision.send()
    while not any(isinstance(event, Received) for event in vision.events):
        assert descriptor.poll(1e3 * DEADLINE)
        vision.links.wait(0.0)


def test_a_lease_that_ends_is_reported_by_the_heartbeat_that_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(connections, "LEASE_SECONDS", 0.5)
    vision = Vision(tmp_path)
    protocol = vision.links._connections
    send_heartbeats = protocol._send_heartbeats
    vision.client._connections._send_heartbeats = (  # type: ignore[method-assign]
        lambda judge: None
    )

    def send_until_a_lease_ends(judge: bool) -> None:
        send_heartbeats(judge)
        if protocol.events:
            monkeypatch.setattr(connections, "BEAT_SECONDS", 10 * DEADLINE)

    protocol._send_heartbeats = send_until_a_lease_ends  # type: ignore[method-assign]
    ends = time.monotonic() + DEADLINE
    while not any(isinstance(event, PeerDown) for event in vision.events):
        vision.links.wait(DEADLINE)
    assert time.monotonic() < ends
    vision.close()


def test_closing_twice_and_waking_afterwards_changes_nothing(vision: Vision) -> None:
    vision.links.close()
    vision.links.close()
    vision.links.wake()
