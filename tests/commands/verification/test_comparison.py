"""Answers against a reference of a few tokens, worked by hand."""

import math

import numpy as np
import pytest

from services.commands.verification.comparison import (
    Served,
    compare,
    compare_vectors,
    first_difference,
)

REFERENCE = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], np.float32))
BEST = [0, 1, 2]


def served(token_ids: list[int], *changes: tuple[int, float]) -> Served:
    """Return the reference's own numbers for these tokens, with some of them moved."""
    log_probs = [float(REFERENCE[n, token]) for n, token in enumerate(token_ids)]
    for step, change in changes:
        log_probs[step] += change
    return Served(None, token_ids, log_probs)


def test_the_same_numbers_agree() -> None:
    found = compare(served(BEST), REFERENCE, 1e-3)
    assert (found.is_within, found.agreement, found.num_tokens) == (True, 1, 3)
    assert (found.max_difference, found.mean_difference, found.first) == (0, 0, None)


def test_numbers_within_the_bound_agree_and_are_told() -> None:
    found = compare(served(BEST, (1, 3e-4), (2, -6e-4)), REFERENCE, 1e-3)
    assert found.is_within
    assert found.max_difference == pytest.approx(6e-4, rel=1e-3)
    assert found.mean_difference == pytest.approx(3e-4, rel=1e-3)


def test_the_first_number_outside_the_bound_is_named() -> None:
    found = compare(served(BEST, (1, 0.01), (2, 0.5)), REFERENCE, 1e-3)
    assert found.first and not found.is_within
    assert (found.first.kind, found.first.index) == ("number", 1)
    assert found.first.difference == pytest.approx(0.01, rel=1e-3)
    assert found.max_difference == pytest.approx(0.5, rel=1e-3)


def test_a_token_that_is_clearly_not_the_best_is_named_with_both_and_their_margin() -> None:
    found = compare(served([0, 0, 2]), REFERENCE, 1e-3)
    assert found.first and not found.is_within
    assert (found.first.kind, found.first.index) == ("token", 1)
    assert (found.first.served, found.first.best) == (0, 1)
    assert found.first.margin == pytest.approx(math.log(2), rel=1e-5)
    assert found.agreement == pytest.approx(2 / 3)


def test_a_tie_is_told_apart_from_a_real_difference() -> None:
    """Both may have moved by the tolerance, so a margin up to twice of it is a tie."""
    nearly = REFERENCE.copy()
    nearly[1] = np.log(np.array([0.49965, 0.50035, 1e-9]))
    found = compare(Served(None, [0, 0, 2]), nearly, 1e-3)
    assert found.is_within and found.num_ties == 1
    assert found.first and (found.first.kind, found.first.index) == ("tie", 1)
    assert found.agreement == pytest.approx(2 / 3)
    assert not compare(Served(None, [0, 0, 2]), nearly, 5e-4).is_within


def test_a_tie_does_not_hide_a_later_difference() -> None:
    nearly = REFERENCE.copy()
    nearly[0] = np.log(np.array([0.5, 0.4999, 1e-4]))
    found = compare(Served(None, [1, 1, 0]), nearly, 1e-3)
    assert found.num_ties == 1
    assert found.first and (found.first.kind, found.first.index) == ("token", 2)


def test_an_answer_shifted_by_a_step_is_found_at_once() -> None:
    found = compare(served([1, 2, 0]), REFERENCE, 1e-3)
    assert found.first and (found.first.kind, found.first.index) == ("token", 0)
    assert found.agreement == 0


def test_the_most_likely_tokens_of_a_step_are_compared_too() -> None:
    top = [{0: float(REFERENCE[0, 0]), 1: float(REFERENCE[0, 1]) + 0.2}, {}, {}]
    found = compare(Served(None, BEST, served(BEST).log_probs, top), REFERENCE, 0.1)
    assert found.first and (found.first.kind, found.first.index) == ("number", 0)
    assert found.max_difference == pytest.approx(0.2, rel=1e-3)
    assert found.mean_difference == 0


def test_without_log_probabilities_the_tokens_alone_are_compared() -> None:
    found = compare(Served(None, BEST), REFERENCE, 1e-3)
    assert found.is_within and math.isnan(found.max_difference)
    assert not compare(Served(None, [2, 1, 2]), REFERENCE, 1e-3).is_within


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_number_that_is_none_lies_outside_any_bound(value: float) -> None:
    log_probs = [*served(BEST).log_probs[:2], value]
    found = compare(Served(None, BEST, log_probs), REFERENCE, 100)
    assert found.first and (found.first.kind, found.first.index) == ("number", 2)
    assert found.max_difference == math.inf


def test_a_reference_that_is_not_a_number_agrees_with_nothing() -> None:
    broken = REFERENCE.copy()
    broken[1] = np.nan
    assert not compare(served(BEST), broken, 100).is_within


def test_vectors_differ_by_the_length_of_their_difference() -> None:
    a, b = np.array([1.0, 0.0], np.float32), np.array([0.8, 0.6], np.float32)
    found = compare_vectors(a, b, 0.7)
    assert found.is_within
    assert found.max_difference == pytest.approx(math.sqrt(0.4), rel=1e-5)
    assert found.agreement == pytest.approx(0.8)
    assert not compare_vectors(a, b, 0.6).is_within
    assert not compare_vectors(a * np.nan, b, 2).is_within


def test_the_first_difference_of_prompts() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
