"""What the benchmark of tracing makes of its rounds."""

import pytest

from benchmarks.tracing import LOADS, Images, Way, report


def way(*rounds: tuple[float, float]) -> Way:
    return Way([], None, rounds={"usual": list(rounds)})


def test_a_ratio_is_that_of_the_same_round() -> None:
    """A machine that is slow for a while is so for every system."""
    unsampled = way((1.0, 0.5), (2.0, 1.0), (8.0, 4.0))
    on = way((1.1, 0.5), (2.2, 1.0), (8.8, 6.0))
    found = report({"unsampled": unsampled, "on": on}, "usual")
    assert found["on_to_unsampled_seconds"] == pytest.approx(1.1)
    assert found["on_to_unsampled_cpu_seconds"] == 1.0
    requests = LOADS["usual"].requests
    assert found["on_seconds_a_request"] == pytest.approx(2.2 / requests, abs=1e-5)


def test_only_the_images_of_the_short_load_are_alike() -> None:
    images = Images()
    assert len({*images.take(LOADS["usual"]), *images.take(LOADS["usual"])}) == 12
    assert len({*images.take(LOADS["short"]), *images.take(LOADS["short"])}) == 1
