"""A work loop is hung, or only busy, idle or stopped with its whole process."""

import pytest

from common.progress import LOADING_SECONDS, UNMEASURED_SECONDS, Progress, UnitTimes


class Watched:
    """A progress whose watcher looks every second of a clock that only moves by `pass_time`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.starved = 0.0
        """The share of each second that the work waits for a core."""
        self.progress = Progress(lambda: self.now, lambda: self.starved)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1)
            self.progress.watch()

    def is_hung_after(self, seconds: float) -> bool:
        self.pass_time(seconds)
        return self.progress.is_hung()


def test_a_unit_without_progress_is_hung_after_three_seconds() -> None:
    watched = Watched()
    watched.progress.begin()
    assert not watched.is_hung_after(3)
    assert watched.is_hung_after(0.5)
    assert watched.progress.age() == pytest.approx(3.5)


def test_a_unit_is_hung_after_four_times_its_expected_time() -> None:
    watched = Watched()
    watched.progress.begin(expected_seconds=10)
    assert not watched.is_hung_after(40)
    assert watched.is_hung_after(1)


def test_a_tick_is_progress() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.pass_time(2)
    watched.progress.tick()
    assert not watched.is_hung_after(2)
    assert watched.is_hung_after(2)


def test_an_idle_loop_is_never_hung_not_even_by_a_tick_of_another_thread() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.progress.idle()
    watched.progress.tick()
    assert not watched.is_hung_after(1000)
    assert watched.progress.age() == 0


def test_loading_is_not_hung_while_it_progresses() -> None:
    watched = Watched()
    watched.progress.begin(LOADING_SECONDS)
    for _ in range(5):
        assert not watched.is_hung_after(290)
        watched.progress.tick()
    assert watched.is_hung_after(310)


def test_a_process_that_was_stopped_as_a_whole_is_not_hung_when_it_continues() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.pass_time(1)
    watched.now += 60  # without a watch
    assert not watched.progress.is_hung(), "whoever asks before the watcher looks again"
    assert not watched.is_hung_after(3)
    assert watched.is_hung_after(2)


def test_work_that_waits_for_a_core_is_not_hung() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.starved = 0.75
    assert not watched.is_hung_after(11)
    assert watched.progress.age() == pytest.approx(11 / 4)
    assert watched.is_hung_after(3)


def test_waiting_for_a_core_before_a_unit_does_not_excuse_it() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.starved = 0.75
    watched.pass_time(8)
    watched.starved = 0.0
    watched.progress.begin()
    assert watched.is_hung_after(4)


def test_a_hang_is_found_however_busy_the_machine_is() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.starved = 1.0
    assert watched.is_hung_after(40)


def test_units_are_measured_and_set_the_patience_for_their_size() -> None:
    watched = Watched()
    times = UnitTimes()
    with watched.progress.unit(times, 100):
        assert not watched.is_hung_after(4 * UNMEASURED_SECONDS), (
            "the first of all may compile and read"
        )
        assert watched.is_hung_after(1)
    assert times.expected(100) == pytest.approx(61)
    assert not watched.progress.is_hung()
    with watched.progress.unit(times, 100):
        assert not watched.is_hung_after(240)


def test_a_unit_within_another_one_leaves_it_its_patience() -> None:
    watched = Watched()
    outer = UnitTimes()
    inner = UnitTimes()
    outer.measured(1, 10.0)
    inner.measured(1, 1.0)
    with watched.progress.unit(outer, 1):
        with watched.progress.unit(inner, 1):
            assert watched.is_hung_after(5)
        assert not watched.is_hung_after(40)
        assert watched.is_hung_after(1)
    assert watched.is_hung_after(4)


def test_an_unseen_size_is_extrapolated_from_the_nearest_measured_one() -> None:
    times = UnitTimes()
    times.measured(100, 2.0)
    assert times.expected(100) == times.expected(127) == 2.0
    assert times.expected(1000) == 16.0, "three buckets up"
    assert times.expected(1) == 2.0, "a part of the cost may not shrink with the size"


def test_the_longest_of_the_recent_units_counts_and_is_forgotten_slowly() -> None:
    times = UnitTimes()
    times.measured(100, 2.0)
    times.measured(100, 0.1)
    assert times.expected(100) == pytest.approx(1.9)
    for _ in range(100):
        times.measured(100, 0.1)
    assert times.expected(100) == pytest.approx(0.1)


def test_at_least_the_given_time_is_expected_of_every_size() -> None:
    times = UnitTimes(least_seconds=2.5)
    times.measured(1, 0.001)
    assert times.expected(1) == 2.5


def test_another_threads_work_counts_as_the_loops_own() -> None:
    watched = Watched()
    other = Progress(lambda: watched.now, lambda: 0.0)
    watched.progress.include(other)
    watched.progress.idle()
    other.idle()
    assert not watched.is_hung_after(100) and watched.progress.age() == 0
    other.begin()
    assert watched.is_hung_after(4) and watched.progress.age() == pytest.approx(4)
    other.idle()
    assert not watched.progress.is_hung()
