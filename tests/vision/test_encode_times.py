"""What the tower took becomes what it is expected to take."""

import pytest

from services.vision.encode_times import EncodeTimes


def test_nothing_is_expected_before_something_was_measured() -> None:
    assert EncodeTimes().expected(64) == 0


def test_the_average_moves_with_what_is_measured() -> None:
    times = EncodeTimes()
    times.measured(64, 1.0)
    assert times.expected(64) == times.expected(40) == 1.0
    for _ in range(20):
        times.measured(64, 2.0)
    assert times.expected(64) == pytest.approx(2.0, rel=0.01)


def test_another_size_is_expected_to_take_its_part() -> None:
    times = EncodeTimes((64, 256, 1024))
    times.measured(200, 1.0)
    assert (times.expected(64), times.expected(65), times.expected(1000)) == (0.25, 1.0, 4.0)


def test_a_change_is_notable_once() -> None:
    times = EncodeTimes()
    assert not times.changed_notably()
    times.measured(64, 1.0)
    assert times.changed_notably() and not times.changed_notably()
    times.measured(64, 1.1)
    assert not times.changed_notably()
    for _ in range(9):
        times.measured(64, 2.0)
    assert times.changed_notably()
