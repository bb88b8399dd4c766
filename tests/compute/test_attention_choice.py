"""Which way to compute attention is chosen from what was measured."""

import torch

from compute.attention_choice import Trial, agreed, fastest, figures_of, nanoseconds_of

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
