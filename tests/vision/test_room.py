"""Room is reserved for the peer that waited longest, and no peer is passed over."""

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


def test_peers_are_admitted_up_to_the_bound() -> None:
    room = full_size()
    assert [room.admits("a", granted) for granted in range(MAX_GRANTED + 1)] == [
        True
    ] * MAX_GRANTED + [False]


def test_a_peer_with_a_more_urgent_item_is_invited_first() -> None:
    room = full_size()
    for peer, priority in (("a", 0), ("b", 1), ("c", -1), ("d", 0), ("b", -2)):
        room.enqueue(peer, priority)
    assert [room.invite(MAX_GRANTED - 1) for _ in range(1)] == [["b"]]
    assert room.admits("b", 0)
    assert room.invite(0) == ["c", "a"]


def test_room_that_is_reserved_for_one_peer_is_refused_to_another() -> None:
    room = full_size()
    room.enqueue("a")
    assert room.invite(MAX_GRANTED - 1) == ["a"]
    assert not room.admits("b", MAX_GRANTED - 1)
    assert room.admits("a", MAX_GRANTED - 1)


@pytest.mark.parametrize("end", ["declined", "forget"])
def test_a_peer_that_declines_or_is_gone_leaves_its_room_to_the_next(end: str) -> None:
    room = full_size()
    for peer_id in ("a", "b"):
        room.enqueue(peer_id)
    assert room.invite(MAX_GRANTED - 1) == ["a"] and room.invite(MAX_GRANTED - 1) == []
    getattr(room, end)("a")
    assert room.invite(MAX_GRANTED - 1) == ["b"]


def test_an_invitation_that_is_not_answered_in_time_ends() -> None:
    clock = Clock()
    room = full_size(clock)
    for peer_id in ("a", "b"):
        room.enqueue(peer_id)
    assert room.invite(MAX_GRANTED - 1) == ["a"]
    clock.now += ANSWER_SECONDS + 0.1
    assert room.invite(MAX_GRANTED - 1) == ["b"]


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_peers_that_keep_asking_are_served_in_the_order_of_their_first_refusal(
    asking: list[str],
) -> None:
    """A peer that finds no room is in the queue once."""
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


# Items that are apart


def test_an_item_that_is_apart_is_admitted_alone_and_nobody_next_to_it() -> None:
    room = full_size()
    assert not room.admits("a", 1, apart=True), "another item is in work"
    assert not room.admits("b", 1), "and no other one is accepted meanwhile"
    assert room.invite(1) == [] and room.invite(0) == ["a"]
    assert not room.admits("b", 0)
    assert room.admits("a", 0, apart=True)
    assert not room.admits("a", 1) and not room.admits("b", 1) and not room.admits("b", 1, True)


@pytest.mark.parametrize("answer", ["offer", "declined", "forget", "silence"])
def test_others_are_admitted_once_the_owner_of_an_item_that_was_apart_has_answered(
    answer: str,
) -> None:
    """Its answer proves that it knows that the replica has survived the item."""
    clock = Clock()
    room = full_size(clock)
    assert room.admits("a", 0, apart=True)
    room.enqueue("b")
    assert room.invite(1) == [], "it is in work"
    assert room.invite(0) == ["a"] and not room.admits("b", 0)
    match answer:
        case "offer":
            assert room.admits("a", 0)
        case "silence":
            clock.now += ANSWER_SECONDS + 0.1
        case _:
            getattr(room, answer)("a")
    assert room.invite(0)[0] == "b"
    assert room.admits("b", 0)


def test_a_late_answer_to_an_earlier_vacancy_does_not_end_the_turn_of_an_item() -> None:
    room = full_size()
    room.enqueue("a")
    assert room.invite(0) == ["a"]
    assert room.admits("a", 0, apart=True)
    room.declined("a")
    assert not room.admits("b", 0)
