"""The expected wait, from which Retry-After is computed."""

import pytest

from common.pace import Pace


def test_the_expected_wait_is_zero_before_the_first_measurement() -> None:
    assert Pace().expected_wait(100) == 0


def test_the_expected_wait_is_the_queue_length_times_the_interval() -> None:
    pace = Pace()
    for n in range(10):
        pace.on_served(0.2 * n, num_waiting=5)
    assert pace.expected_wait(32) == pytest.approx(6.4)


def test_time_without_waiting_requests_does_not_count() -> None:
    pace = Pace()
    pace.on_served(0.0, 1)
    pace.on_served(0.2, 0)
    pace.on_served(1000.0, 1)
    pace.on_served(1000.2, 1)
    assert pace.expected_wait(10) == pytest.approx(2.0)


def test_the_expected_wait_follows_a_system_that_becomes_slower() -> None:
    pace = Pace()
    now = 0.0
    for interval in [0.1] * 20 + [1.0] * 60:
        now += interval
        pace.on_served(now, 1)
    assert pace.expected_wait(1) == pytest.approx(1.0, rel=0.01)
