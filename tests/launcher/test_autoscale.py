"""The autoscaling policy against traces of a pool's load."""

import itertools

import pytest

from common.config import BadSetting
from services.launcher.autoscale import (
    DOWN_SECONDS,
    HIGH_DELAY_SECONDS,
    Autoscaler,
    Bounds,
    Sample,
    parse_bounds,
)


class Pool:
    """A pool that follows the policy, with a sample each second. New replicas may need to load."""

    def __init__(self, wanted: int, most: int = 8, loading_seconds: int = 0) -> None:
        self.autoscaler = Autoscaler(Bounds(1, most))
        self.wanted = wanted
        self.ready = wanted
        self.loading_seconds = loading_seconds
        self.loaded_at = 0
        self.seconds = itertools.count()

    def run(self, seconds: int, delay: float, busy: int) -> list[int]:
        """Return how many replicas were wanted after each second."""
        return [self.step(next(self.seconds), delay, busy) for _ in range(seconds)]

    def step(self, now: int, delay: float, busy: int) -> int:
        if now >= self.loaded_at:
            self.ready = self.wanted
        wanted = self.autoscaler.recommend(Sample(float(now), delay, busy, self.ready, self.wanted))
        if wanted > self.wanted:
            self.loaded_at = now + self.loading_seconds
        self.wanted = wanted
        return wanted


HIGH = 2 * HIGH_DELAY_SECONDS


def test_the_count_doubles_while_images_wait_up_to_the_bound() -> None:
    assert Pool(1, most=6).run(15, HIGH, 1)[::3] == [1, 2, 4, 6, 6]


def test_a_short_delay_changes_nothing() -> None:
    pool = Pool(2)
    for _ in range(20):
        assert set(pool.run(2, HIGH, 2) + pool.run(1, 0.0, 2)) == {2}


def test_no_more_replicas_are_added_while_some_are_loading() -> None:
    pool = Pool(1, loading_seconds=60)
    assert set(pool.run(60, HIGH, 1)[2:]) == {2}
    assert pool.run(10, HIGH, 2)[-1] == 4


def test_idle_replicas_are_removed_one_a_minute_down_to_the_bound() -> None:
    wanted = Pool(3).run(4 * int(DOWN_SECONDS), 0.0, 0)
    changes = [
        now for now, (before, after) in enumerate(itertools.pairwise(wanted)) if before != after
    ]
    assert wanted[-1] == 1
    assert (
        len(changes) == 2
        and changes[0] >= 0.95 * DOWN_SECONDS
        and changes[1] - changes[0] >= 0.95 * DOWN_SECONDS
    )


def test_no_replica_is_removed_if_the_rest_would_be_too_busy() -> None:
    """With three of four replicas busy, three would be full and images would wait again."""
    assert set(Pool(4).run(300, 0.0, 3)) == {4}
    assert Pool(4).run(300, 0.0, 2)[-1] == 3


def test_one_delay_in_the_minute_keeps_all_replicas() -> None:
    pool = Pool(2)
    for _ in range(6):
        assert set(pool.run(int(DOWN_SECONDS) - 2, 0.0, 0) + pool.run(1, HIGH, 2)) == {2}


def test_growing_restarts_the_minute() -> None:
    pool = Pool(1)
    pool.run(50, 0.0, 1)
    assert pool.run(3, HIGH, 1)[-1] == 2
    assert set(pool.run(int(DOWN_SECONDS) - 5, 0.0, 0)) == {2}


def test_a_count_outside_the_bounds_is_moved_inside() -> None:
    assert Autoscaler(Bounds(2, 4)).recommend(Sample(0.0, 0.0, 0, 1, 1)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "vision",
        "vision=4",
        "vision=0:4",
        "vision=4:1",
        "llm=1:2",
        "vision=1:4,llm=1:2",
        "vision=a:b",
    ],
)
def test_invalid_bounds_are_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="--autoscale"):
        parse_bounds(text)


def test_bounds_are_parsed() -> None:
    assert parse_bounds("vision=1:4") == Bounds(1, 4)
