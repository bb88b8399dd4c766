"""Retry-After comes from how fast waiting requests get on."""

import pytest

from services.gateway.pace import Pace


def test_nothing_is_expected_before_anything_was_measured() -> None:
    assert Pace().expected_wait(100) == 0


def test_the_wait_is_the_number_of_those_that_wait_times_the_interval_between_two() -> None:
    pace = Pace()
    for n in range(10):
        pace.on_first_token(0.2 * n, num_waiting=5)
    assert pace.expected_wait(32) == pytest.approx(6.4)


def test_a_pause_in_which_nobody_waited_is_no_slowness() -> None:
    pace = Pace()
    pace.on_first_token(0.0, 1)
    pace.on_first_token(0.2, 0)
    pace.on_first_token(1000.0, 1)
    pace.on_first_token(1000.2, 1)
    assert pace.expected_wait(10) == pytest.approx(2.0)


def test_it_follows_a_system_that_becomes_slower() -> None:
    pace = Pace()
    now = 0.0
    for interval in [0.1] * 20 + [1.0] * 60:
        now += interval
        pace.on_first_token(now, 1)
    assert pace.expected_wait(1) == pytest.approx(1.0, rel=0.01)
