"""A member drains: it says so to everyone, its work loop hears of it, and its events end when it
holds nothing."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from common import member
from common.events import PeerDraining, PeerUp, Received
from common.hello import hello
from common.links import Links
from common.member import Drain, Member
from common.membership import DRAINING, READY, STANDBY, STARTING
from common.messages import Grant, Offer, Peer, VisionInbound
from common.process import Stop
from common.settings import VisionSettings

DEADLINE = 20.0
OFFER = Offer(
    request_id="r",
    attempt=0,
    item=0,
    mm_hash="h",
    grid_thw=(1, 2, 2),
    num_patches=4,
    llm=Peer("llm", "ipc://x"),
    timeout=9.0,
)


class NoControlPlane:
    """Remembers what a member says to its controller."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.states: list[int] = []

    def set_state(self, state: int, detail: str = "", max_model_len: int = 0) -> None:
        self.states.append(state)

    def leave(self) -> None:
        pass


class Left(Exception):
    pass


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "Membership", NoControlPlane)


class Vision:
    """A vision member whose load the test sets."""

    def __init__(self, **options: Any) -> None:
        self.stop = Stop()
        self.load = (0, 0)
        self.member: Member[VisionInbound] = Member(
            VisionSettings(), "vision", self.stop, **options
        )
        self.member.track_load(lambda: self.load)
        self.states: list[int] = self.member.membership.states  # type: ignore[attr-defined]


class Client:
    """A preprocess that is connected to it."""

    def __init__(self, member_id: str, vision: Vision) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.links = Links(hello(member_id, "preprocess"), "", "", self.events.put)
        self.links.connect(vision.member.peer, "vision")
        assert isinstance(self.next(), PeerUp)

    def next(self) -> Any:
        return self.events.get(timeout=DEADLINE)


@pytest.fixture
def vision() -> Iterator[Vision]:
    one = Vision(drains=True)
    yield one
    one.member.close()


def works(vision: Vision) -> None:
    """Its work loop has begun."""
    assert vision.member.take_events(wait=False) == []


def test_who_is_connected_hears_that_it_drains_and_who_connects_later_too(vision: Vision) -> None:
    works(vision)
    early = Client("preprocess-1", vision)
    vision.member.ready()
    vision.stop.drain()
    assert early.next() == PeerDraining(vision.member.id, "vision")
    late = Client("preprocess-2", vision)
    assert late.next() == PeerDraining(vision.member.id, "vision")
    assert vision.states == [READY, DRAINING]
    for client in (early, late):
        client.links.close()


def test_the_loop_hears_of_it_once_and_ends_when_nothing_is_held(vision: Vision) -> None:
    vision.load = (1, 0)
    works(vision)
    vision.stop.drain()
    assert vision.member.take_events(wait=True) == [Drain()]
    # It holds something.
    assert vision.member.take_events(wait=True, timeout=2 * member.QUIET_SECONDS) == []
    vision.load = (0, 0)
    assert vision.member.take_events(wait=True) is None
    assert vision.member.next_event() is None


def test_what_was_sent_to_it_before_its_peers_knew_is_still_taken(vision: Vision) -> None:
    works(vision)
    client = Client("preprocess-1", vision)
    assert isinstance(vision.member.next_event(), PeerUp)
    vision.stop.drain()
    assert vision.member.next_event() == Drain()
    client.links.send(vision.member.id, OFFER)
    event = vision.member.next_event()
    assert isinstance(event, Received) and event.message == OFFER
    vision.member.links.send("preprocess-1", Grant(request_id="r", attempt=0, item=0))
    assert client.next() == PeerDraining(vision.member.id, "vision")
    assert isinstance(client.next(), Received)  # it goes on talking
    client.links.close()


@pytest.mark.parametrize(("role", "num_heard"), [("llm", 2), ("preprocess", 9)])
def test_only_what_may_bring_work_keeps_it(
    role: str, num_heard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it gives work to tell it of their load all the time, and it would never be
    quiet."""
    one = Vision(drains=True, peers=("llm",))
    works(one)
    one.stop.drain()
    assert one.member.next_event() == Drain()
    ticks = itertools.count(time.monotonic() + member.QUIET_SECONDS, member.QUIET_SECONDS / 5)
    monkeypatch.setattr(member, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    for _ in range(9):
        one.member.requeue([Received("one", role, OFFER)])
    one.member._last_event = next(ticks)
    heard = list(iter(one.member.next_event, None))
    assert len(heard) == num_heard
    one.member.close()


def test_before_it_leaves_it_hears_what_came_while_it_worked(
    vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    works(vision)
    client = Client("p", vision)
    assert isinstance(vision.member.next_event(), PeerUp)
    vision.stop.drain()
    assert vision.member.next_event() == Drain()
    monkeypatch.setattr(member, "QUIET_SECONDS", DEADLINE)
    vision.member._last_event = time.monotonic() - 2 * DEADLINE  # the work took long
    client.links.send(vision.member.id, OFFER)
    assert vision.member.next_event() == Received("p", "preprocess", OFFER)
    client.links.close()


def test_while_it_drains_no_other_state_is_told(vision: Vision) -> None:
    works(vision)
    vision.stop.drain()
    vision.member.set_missing_roles(["llm"])
    vision.member.ready()
    assert vision.states == [DRAINING]


def test_while_it_loads_it_leaves_at_once(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        assert status == 0
        raise Left

    monkeypatch.setattr(member, "leave", leave)
    with pytest.raises(Left):
        vision.stop.drain()


def test_to_stop_does_not_wait_for_the_end_of_loading(
    vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(member, "leave", statuses.put)
    vision.stop.set()
    assert statuses.get(timeout=DEADLINE) == 0


def test_one_that_does_not_drain_stops() -> None:
    one = Vision()
    works(one)
    one.stop.drain()
    assert one.member.next_event() is None
    one.member.close()


def test_a_standby_is_ready_when_it_is_promoted() -> None:
    one = Vision(standby=True)
    one.member.ready()
    works(one)
    one.stop.promote()
    assert one.states == [STANDBY, READY]
    one.member.close()


def test_one_that_is_promoted_while_it_loads_is_ready_when_it_has_loaded() -> None:
    one = Vision(standby=True)
    one.stop.promote()
    one.member.set_missing_roles(["llm"])
    assert one.states == [STARTING]
    one.member.ready()
    assert one.states == [STARTING, READY]
    works(one)
    one.member.close()


def test_to_stop_ends_the_wait_of_a_member_that_drains(vision: Vision) -> None:
    vision.load = (1, 0)
    works(vision)
    vision.stop.drain()
    assert vision.member.next_event() == Drain()
    threading.Timer(0.05, vision.stop.set).start()
    assert vision.member.next_event() is None
