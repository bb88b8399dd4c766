"""One budget for all: room is kept for who waited longest, and nobody is passed over."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.vision.room import ANSWER_SECONDS, MAX_GRANTED, Room


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def full_size(clock: Callable[[], float] = time.monotonic) -> Room:
    room = Room(clock)
    room.size = MAX_GRANTED
    return room


def test_there_is_room_up_to_the_bound() -> None:
    room = full_size()
    assert [room.admits("a", granted) for granted in range(MAX_GRANTED + 1)] == [
        True
    ] * MAX_GRANTED + [False]


def test_room_that_is_kept_for_one_is_not_for_another() -> None:
    room = full_size()
    room.enqueue("a")
    assert room.invite(MAX_GRANTED - 1) == ["a"]
    assert not room.admits("b", MAX_GRANTED - 1)
    assert room.admits("a", MAX_GRANTED - 1)


@pytest.mark.parametrize("end", ["declined", "forget"])
def test_who_does_not_want_it_or_is_gone_leaves_it_to_the_next(end: str) -> None:
    room = full_size()
    for peer_id in ("a", "b"):
        room.enqueue(peer_id)
    assert room.invite(MAX_GRANTED - 1) == ["a"] and room.invite(MAX_GRANTED - 1) == []
    getattr(room, end)("a")
    assert room.invite(MAX_GRANTED - 1) == ["b"]


def test_silence_is_a_no() -> None:
    clock = Clock()
    room = full_size(clock)
    for peer_id in ("a", "b"):
        room.enqueue(peer_id)
    assert room.invite(MAX_GRANTED - 1) == ["a"]
    clock.now += ANSWER_SECONDS + 0.1
    assert room.invite(MAX_GRANTED - 1) == ["b"]


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_who_keeps_asking_gets_a_turn_within_as_many_as_there_are(asking: list[str]) -> None:
    """Each that finds no room is in the queue once, and is served in the order in which it came
    there."""
    room = full_size()
    expected = list[str]()
    for peer_id in asking:
        assert not room.admits(peer_id, MAX_GRANTED)
        room.enqueue(peer_id)
        if peer_id not in expected:
            expected.append(peer_id)
    served = []
    while invited := room.invite(MAX_GRANTED - 1):
        assert len(invited) == 1
        served += invited
        assert room.admits(invited[0], MAX_GRANTED - 1)
    assert served == expected
