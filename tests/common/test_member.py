"""A member that drains announces it, finishes what it holds, and then its events end."""

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
from common.member import Drain, Member, Profile
from common.membership import DRAINING, READY, STANDBY, STARTING
from common.messages import Grant, Offer, Peer, VisionInbound
from common.process import Stop
from common.settings import VisionSettings
from proto.twinlens.control.v1 import control_pb2

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
    """Records the states that a member reports to its controller."""

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

    def __init__(self, peers: tuple[str, ...] = (), **options: Any) -> None:
        self.stop = Stop()
        self.load = (0, 0)
        self.member: Member[VisionInbound] = Member(
            VisionSettings(), self.stop, Profile(role="vision", peers=peers), **options
        )
        self.member.track_load(lambda: self.load)
        self.states: list[int] = self.member.membership.states  # type: ignore[attr-defined]


class Client:
    """A preprocess that is connected to the vision member."""

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


def start_working(vision: Vision) -> None:
    """Begin the work loop."""
    assert vision.member.take_events(wait=False) == []


def test_present_and_later_peers_are_notified_of_a_drain(vision: Vision) -> None:
    start_working(vision)
    early = Client("preprocess-1", vision)
    vision.member.ready()
    vision.stop.drain()
    assert early.next() == PeerDraining(vision.member.id, "vision")
    late = Client("preprocess-2", vision)
    assert late.next() == PeerDraining(vision.member.id, "vision")
    assert vision.states == [READY, DRAINING]
    for client in (early, late):
        client.links.close()


def test_the_work_loop_gets_one_drain_event_and_ends_when_nothing_is_held(vision: Vision) -> None:
    vision.load = (1, 0)
    start_working(vision)
    vision.stop.drain()
    assert vision.member.take_events(wait=True) == [Drain()]
    # It holds something.
    assert vision.member.take_events(wait=True, timeout=2 * member.QUIET_SECONDS) == []
    vision.load = (0, 0)
    assert vision.member.take_events(wait=True) is None
    assert vision.member.next_event() is None


def test_a_message_sent_before_peers_knew_of_the_drain_is_still_handled(vision: Vision) -> None:
    start_working(vision)
    client = Client("preprocess-1", vision)
    assert isinstance(vision.member.next_event(), PeerUp)
    vision.stop.drain()
    assert vision.member.next_event() == Drain()
    client.links.send(vision.member.id, OFFER)
    event = vision.member.next_event()
    assert isinstance(event, Received) and event.message == OFFER
    vision.member.links.send("preprocess-1", Grant(request_id="r", attempt=0, item=0))
    assert client.next() == PeerDraining(vision.member.id, "vision")
    assert isinstance(client.next(), Received)  # it still sends
    client.links.close()


@pytest.mark.parametrize(("role", "num_events"), [("llm", 2), ("preprocess", 9)])
def test_only_messages_that_may_bring_work_delay_the_end_of_a_drain(
    role: str, num_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers that it gives work to report their load all the time, so it would never be quiet."""
    one = Vision(drains=True, peers=("llm",))
    start_working(one)
    one.stop.drain()
    assert one.member.next_event() == Drain()
    ticks = itertools.count(time.monotonic() + member.QUIET_SECONDS, member.QUIET_SECONDS / 5)
    monkeypatch.setattr(member, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    for _ in range(9):
        one.member.requeue([Received("one", role, OFFER)])
    one.member._last_event = next(ticks)
    found = list(iter(one.member.next_event, None))
    assert len(found) == num_events
    one.member.close()


def test_it_handles_what_arrived_during_its_last_work_before_it_leaves(
    vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_working(vision)
    client = Client("p", vision)
    assert isinstance(vision.member.next_event(), PeerUp)
    vision.stop.drain()
    assert vision.member.next_event() == Drain()
    monkeypatch.setattr(member, "QUIET_SECONDS", DEADLINE)
    vision.member._last_event = time.monotonic() - 2 * DEADLINE  # the work took a long time
    client.links.send(vision.member.id, OFFER)
    assert vision.member.next_event() == Received("p", "preprocess", OFFER)
    client.links.close()


def test_a_draining_member_reports_no_other_state(vision: Vision) -> None:
    start_working(vision)
    vision.stop.drain()
    vision.member.set_missing_roles(["llm"])
    vision.member.ready()
    assert vision.states == [DRAINING]


def test_a_loading_member_that_drains_leaves_at_once(
    vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(status: int) -> None:
        assert status == 0
        raise Left

    monkeypatch.setattr(member, "leave", leave)
    with pytest.raises(Left):
        vision.stop.drain()


def test_a_loading_member_that_stops_leaves_at_once(
    vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(member, "leave", statuses.put)
    vision.stop.set()
    assert statuses.get(timeout=DEADLINE) == 0


def test_a_member_that_cannot_drain_stops() -> None:
    one = Vision()
    start_working(one)
    one.stop.drain()
    assert one.member.next_event() is None
    one.member.close()


def test_a_standby_is_ready_when_it_is_promoted() -> None:
    one = Vision(standby=True)
    one.member.ready()
    start_working(one)
    one.stop.promote()
    assert one.states == [STANDBY, READY]
    one.member.close()


def test_a_standby_promoted_while_it_loads_is_ready_once_it_has_loaded() -> None:
    one = Vision(standby=True)
    one.stop.promote()
    one.member.set_missing_roles(["llm"])
    assert one.states == [STARTING]
    one.member.ready()
    assert one.states == [STARTING, READY]
    start_working(one)
    one.member.close()


def test_a_stop_ends_the_wait_of_a_draining_member(vision: Vision) -> None:
    vision.load = (1, 0)
    start_working(vision)
    vision.stop.drain()
    assert vision.member.next_event() == Drain()
    threading.Timer(0.05, vision.stop.set).start()
    assert vision.member.next_event() is None


# Which members it connects to


def entry(role: str, **fields: Any) -> control_pb2.Member:
    return control_pb2.Member(**{"id": "x", "role": role, "state": READY} | fields)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (entry("vision"), True),
        (entry("vision", state=DRAINING), True),
        (entry("vision", state=STARTING), False),
        (entry("vision", state=STANDBY), False),
        (entry("vision", fingerprint="aa"), True),
        (entry("vision", fingerprint="bb"), False),
        (entry("detokenizer"), False),
        (entry("llm", group="g", rank=0), True),
        (entry("llm", group="g", rank=1), False),
    ],
    ids=str,
)
def test_it_gives_work_to_ready_members_of_its_peers_and_its_model(
    other: control_pb2.Member, expected: bool
) -> None:
    profile = Profile(role="preprocess", fingerprint="aa", peers=("vision", "llm"))
    assert profile.gives_work_to(other) is expected


def test_ranks_share_a_group_by_its_name() -> None:
    profile = Profile(role="llm", group="g")
    assert profile.shares_group_with(entry("llm", group="g", rank=1, state=STARTING))
    assert not profile.shares_group_with(entry("llm", group="g", rank=0))
    assert not profile.shares_group_with(entry("llm", group="other", rank=1))


def test_a_work_loop_takes_no_more_events_at_once_than_it_can_stamp(vision: Vision) -> None:
    """A thousand events are not one unit of work. The rest follows without a wait."""
    start_working(vision)
    for number in range(member.MAX_EVENTS + 3):
        vision.member.post(number)
    first = vision.member.take_events(wait=True)
    rest = vision.member.take_events(wait=True)
    assert first is not None and rest is not None
    assert (len(first), len(rest)) == (member.MAX_EVENTS, 3)
