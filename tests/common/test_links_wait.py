"""A work loop that waits for its connections itself, and the I/O thread that stands in where it
does not."""

import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import links as links_module
from common.events import PeerDown, Received
from common.hello import hello
from common.links import Links
from common.messages import Abort, Peer

DEADLINE = 60.0


class Told(threading.Event):
    """Knows whether somebody waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.is_waited_for.set()
        return super().wait(timeout)


class Vision:
    """A replica, what it heard, and on which threads; and a preprocess that sends to it."""

    def __init__(self, folder: Path) -> None:
        self.events: deque[Any] = deque()
        self.threads: deque[threading.Thread] = deque()
        self.num_sent = 0
        self.links = Links(hello("v", "vision"), f"ipc://{folder}/inbox", "", self.hear)
        self.links._ending = self.ending = Told()
        self.client = Links(hello("p", "preprocess"), "", "", lambda event: None)
        self.client.connect(Peer("v", self.links.address), "vision")

    def hear(self, event: Any) -> None:
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
    monkeypatch.setattr(links_module, "BEAT_SECONDS", 10 * DEADLINE)
    one = Vision(tmp_path)
    yield one
    one.close()


def test_from_the_first_wait_on_what_comes_is_heard_on_the_waiting_thread(vision: Vision) -> None:
    vision.send()
    vision.wait_for(0)
    while not vision.ending.is_waited_for.is_set():  # the I/O thread rests from here on
        vision.send()
        vision.wait_for(vision.num_sent - 1)
    vision.threads.clear()
    for _ in range(50):
        vision.send()
        vision.wait_for(vision.num_sent - 1)
    assert set(vision.threads) == {threading.current_thread()}


def test_what_the_io_thread_took_ends_the_next_wait_at_once(vision: Vision) -> None:
    vision.send()
    while not any(isinstance(event, Received) for event in vision.events):
        time.sleep(0.001)
    began = time.monotonic()
    vision.links.wait(DEADLINE)
    assert vision.threads[-1] is not threading.current_thread()
    assert time.monotonic() - began < DEADLINE


def test_a_wake_ends_the_wait_that_is_under_way_or_the_next_one(vision: Vision) -> None:
    began = time.monotonic()
    vision.links.wake()
    vision.links.wait(DEADLINE)
    waking = threading.Timer(0.01, vision.links.wake)
    waking.start()
    vision.links.wait(DEADLINE)
    waking.join()
    assert time.monotonic() - began < DEADLINE


def test_a_loop_of_its_own_is_told_by_the_descriptor(vision: Vision) -> None:
    heard = select.poll()
    heard.register(vision.links.fileno(), select.POLLIN)
    vision.send()
    while not any(isinstance(event, Received) for event in vision.events):
        assert heard.poll(1e3 * DEADLINE)
        vision.links.wait(0.0)


def test_a_lease_that_ends_is_told_at_the_beat_that_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(links_module, "LEASE_SECONDS", 0.5)
    vision = Vision(tmp_path)
    beat = vision.links._beat
    vision.client._beat = lambda judge: None  # type: ignore[method-assign]

    def beat_and_beat_no_more(judge: bool) -> None:
        beat(judge)
        if vision.links._news:
            monkeypatch.setattr(links_module, "BEAT_SECONDS", 10 * DEADLINE)

    vision.links._beat = beat_and_beat_no_more  # type: ignore[method-assign]
    ends = time.monotonic() + DEADLINE
    while not any(isinstance(event, PeerDown) for event in vision.events):
        vision.links.wait(DEADLINE)
    assert time.monotonic() < ends
    vision.close()


def test_closing_twice_and_waking_after_it_changes_nothing(vision: Vision) -> None:
    vision.links.close()
    vision.links.close()
    vision.links.wake()
