"""Which request has a process to itself, and who may say so."""

from common.apart import REPEAT_SECONDS, Turn

KEY = ("r", 0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_turn_is_announced_until_its_gateway_has_noted_it() -> None:
    clock = Clock()
    turn = Turn(clock)
    assert turn.announcement() is None
    turn.take(KEY, "gateway")
    assert turn.announcement() == ("gateway", KEY)
    assert turn.announcement() is None, "once"
    clock.now += REPEAT_SECONDS
    assert turn.announcement() == ("gateway", KEY), "the gateway may not have been connected"
    turn.note(KEY, "gateway")
    clock.now += REPEAT_SECONDS
    assert turn.announcement() is None and turn.is_noted


def test_nobody_else_has_a_say_in_a_turn() -> None:
    turn = Turn()
    turn.take(KEY, "gateway")
    turn.note(KEY, "other")
    turn.note(("r", 1), "gateway")
    assert not turn.is_noted
    assert not turn.release(KEY, "other") and not turn.release(("r", 1), "gateway")
    turn.release_all_of("other")
    turn.release_expired(("r", 1))
    assert turn.holder == KEY
    assert turn.release(KEY, "gateway") and turn.holder is None


def test_the_next_turn_is_announced_again() -> None:
    turn = Turn()
    turn.take(KEY, "gateway")
    turn.note(KEY, "gateway")
    turn.release_all_of("gateway")
    turn.take(("r", 1), "gateway")
    assert not turn.is_noted and turn.announcement() == ("gateway", ("r", 1))
