"""The expected time of an item follows the measured times."""

import pytest

from services.vision.encode_times import EncodeTimes


def test_nothing_is_expected_before_something_was_measured() -> None:
    assert EncodeTimes().expected(64) == 0


def test_the_average_follows_the_measurements() -> None:
    times = EncodeTimes()
    times.record(64, 1.0)
    assert times.expected(64) == times.expected(40) == 1.0
    for _ in range(20):
        times.record(64, 2.0)
    assert times.expected(64) == pytest.approx(2.0, rel=0.01)


def test_a_bucket_without_measurements_is_extrapolated_from_the_nearest_one() -> None:
    times = EncodeTimes((64, 256, 1024))
    times.record(200, 1.0)
    assert (times.expected(64), times.expected(65), times.expected(1000)) == (0.25, 1.0, 4.0)


def test_a_notable_change_is_reported_once() -> None:
    times = EncodeTimes()
    assert not times.changed_notably()
    times.record(64, 1.0)
    assert times.changed_notably() and not times.changed_notably()
    times.record(64, 1.1)
    assert not times.changed_notably()
    for _ in range(9):
        times.record(64, 2.0)
    assert times.changed_notably()
