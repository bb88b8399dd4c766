"""What the benchmark of tracing makes of its rounds."""

from typing import Any, cast

import pytest

from benchmarks.tracing import LOADS, Images, System, report


def system(*rounds: tuple[float, float]) -> System:
    return System(cast(Any, None), [], None, {"usual": list(rounds)})


def test_a_ratio_is_that_of_the_same_round() -> None:
    """A machine that is slow for a while is so for every system."""
    off = system((1.0, 0.5), (2.0, 1.0), (8.0, 4.0))
    on = system((1.1, 0.5), (2.2, 1.0), (8.8, 6.0))
    found = report({"off": off, "on": on}, "usual")
    assert found["on_seconds_ratio"] == pytest.approx(1.1)
    assert found["on_cpu_seconds_ratio"] == 1.0
    requests = LOADS["usual"].requests
    assert found["off_seconds_a_request"] == pytest.approx(2.0 / requests, abs=1e-5)


def test_only_the_images_of_the_short_load_are_alike() -> None:
    images = Images()
    assert len({*images.take(LOADS["usual"]), *images.take(LOADS["usual"])}) == 12
    assert len({*images.take(LOADS["short"]), *images.take(LOADS["short"])}) == 1
