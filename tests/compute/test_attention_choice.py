"""Which way to compute attention is chosen from what was measured."""

import pytest
import torch

from compute.attention_choice import (
    REPEATS,
    Trial,
    agreed,
    fastest,
    figures_of,
    nanoseconds_of,
    reason_of,
)

CPU = torch.device("cpu")


def test_the_least_weighted_geometric_mean_is_chosen() -> None:
    first = Trial("first", (100, 100))
    second = Trial("second", (40, 200))
    assert fastest([first, second], (1, 1)) is second
    assert fastest([first, second], (1, 2)) is first


def test_a_long_case_does_not_outweigh_a_short_one() -> None:
    assert (
        fastest([Trial("long", (100, 9000)), Trial("short", (10, 10000))], (1, 1)).name == "short"
    )


def test_the_first_of_equals_is_chosen() -> None:
    trials = [Trial("first", (5,)), Trial("second", (5,))]
    assert fastest(trials, (1,)) is trials[0]


def test_what_cannot_run_is_not_chosen() -> None:
    unable = Trial("unable", objection="no")
    able = Trial("able", (1,))
    assert fastest([unable, able], (1,)) is able
    assert fastest([unable], (1,)) is None


def test_ranks_agree_on_the_slowest_figure_and_on_what_all_can_run() -> None:
    """Two ranks, whose calls of `agree` are answered with what the other one passes."""
    mine = [Trial("a", (10, 30)), Trial("b", (1, 1)), Trial("c", objection="mine")]
    others = [Trial("a", (20, 20)), Trial("b", objection="its own"), Trial("c", (5, 5))]
    passed: list[int] = []
    agreed(others, 2, lambda count: passed.append(count) or count)
    answers = iter(passed)
    found = agreed(mine, 2, lambda count: min(count, next(answers)))
    assert found[0] == Trial("a", (20, 30))
    assert "another rank" in found[1].objection and found[2].objection == "mine"
    assert next(answers, None) is None, "each rank asks equally often"


def test_the_log_says_each_figure_and_each_objection() -> None:
    trials = [Trial("a", (1500, 20)), Trial("b", objection="not installed")]
    assert figures_of(trials, ("one", "two")) == {
        "a": "one 1.5 µs, two 0.0 µs",
        "b": "left out: not installed",
    }


def test_a_run_is_timed_after_others_that_warm_it_up() -> None:
    runs: list[None] = []
    assert nanoseconds_of(lambda: runs.append(None), CPU) >= 1
    assert len(runs) == 8


def test_the_time_on_a_card_hardly_counts_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a run takes 3 ms, and the card waits a millisecond for the first one."""
    runs: list[None] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.num_runs = len(runs)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return 1 + 3 * (other.num_runs - self.num_runs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = nanoseconds_of(lambda: runs.append(None), torch.device("cuda"))
    assert REPEATS >= 10 and found == 3e6 + 1e6 / REPEATS


def test_an_objection_names_the_error_that_came_first() -> None:
    assert reason_of(RuntimeError("no kernel\nand more")) == "RuntimeError: no kernel"
    try:
        try:
            raise ValueError("too large\nand more")
        finally:
            raise RuntimeError("the capture was invalidated")
    except RuntimeError as e:
        found = reason_of(e)
    assert found == "RuntimeError: the capture was invalidated, after ValueError: too large"
