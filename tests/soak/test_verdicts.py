"""Planted duplicates, lost requests, differing answers and failures are found."""

from dataclasses import replace

import pytest

from tests.soak.answers import Answer, Outcome
from tests.soak.reference import Reference
from tests.soak.verdicts import Tally, difference
from tests.soak.workload import Call, Question

QUESTION = Question("what", (), 4, True, (), 0.0, 0)
CALL = Call(1, QUESTION, "http", True, "patient", 60.0, "PNG")
REFERENCE = Reference([5, 6, 7, 8], "abcd", "length", first_tie=4)


def good_answer() -> Answer:
    answer = Answer()
    for offset, (token_id, text) in enumerate(
        zip(REFERENCE.token_ids, REFERENCE.text, strict=True)
    ):
        answer.add([token_id], text, offset)
    answer.end("length")
    answer.num_completion_tokens = 4
    return answer


def count(outcome: Outcome, call: Call = CALL, reference: Reference = REFERENCE) -> Tally:
    tally = Tally()
    tally.count(call, outcome, {QUESTION: reference})
    return tally


def test_the_undisturbed_answer_is_counted_as_answered() -> None:
    tally = count(Outcome("answered", good_answer()))
    assert (tally.answered, tally.is_clean) == (1, True)


def test_a_lost_request_is_found() -> None:
    tally = count(Outcome("nothing", Answer(), message="no end in time"))
    assert (tally.lost, tally.answered, tally.is_clean) == (1, 0, False)


def test_a_second_end_is_found() -> None:
    answer = good_answer()
    answer.end("length")
    tally = count(Outcome("answered", answer))
    assert (tally.duplicates, tally.is_clean) == (1, False)


def test_a_piece_after_the_end_is_found() -> None:
    answer = good_answer()
    answer.add([9], "x")
    assert count(Outcome("answered", answer)).duplicates == 1


@pytest.mark.parametrize("offset", [1, 3])
def test_a_repeated_or_skipped_offset_is_found(offset: int) -> None:
    answer = Answer()
    answer.add([5, 6], "ab", 0)
    answer.add([7], "c", offset)
    assert count(Outcome("hung_up", answer)).duplicates == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"token_ids": [5, 6, 9, 8]},
        {"token_ids": [5, 6, 7]},
        {"token_ids": [5, 6, 6, 7, 8]},
        {"token_ids": [5, 6, 7, 8, 9]},
        {"text": "abc"},
        {"text": "abxd"},
        {"text": "abcde"},
        {"finish_reasons": ["stop"]},
        {"num_completion_tokens": 3},
        {"num_completion_tokens": None},
        {"token_ids": [], "text": ""},
    ],
)
def test_a_whole_answer_that_differs_is_found(changed: dict[str, object]) -> None:
    tally = count(Outcome("answered", replace(good_answer(), **changed)))
    assert (tally.differing, tally.near_ties, tally.is_clean) == (1, 0, False)


def test_the_beginning_of_an_answer_is_compared_too() -> None:
    assert difference(Answer([5, 6], "a"), REFERENCE, is_whole=False) is None
    assert difference(Answer([5, 9], "a"), REFERENCE, is_whole=False) is not None
    assert difference(Answer([5, 6], "b"), REFERENCE, is_whole=False) is not None


@pytest.mark.parametrize(
    ("token_ids", "verdict"),
    [([5, 6, 1, 2], "tie"), ([5, 6, 1], "tie"), ([5, 1, 7, 8], "token 1 differs")],
)
def test_only_what_follows_a_near_tie_may_differ(token_ids: list[int], verdict: str) -> None:
    answer = replace(good_answer(), token_ids=token_ids)
    assert difference(answer, replace(REFERENCE, first_tie=2), is_whole=True) == verdict


def test_an_answer_that_parts_at_a_near_tie_is_counted_apart() -> None:
    tally = count(
        Outcome("answered", replace(good_answer(), token_ids=[5, 6, 1])),
        reference=replace(REFERENCE, first_tie=2),
    )
    assert (tally.near_ties, tally.differing, tally.is_clean) == (1, 0, True)


def test_an_answer_that_is_equal_despite_a_near_tie_must_end_equally() -> None:
    answer = replace(good_answer(), text="abxd")
    assert (
        count(Outcome("answered", answer), reference=replace(REFERENCE, first_tie=2)).differing == 1
    )


def test_failures_are_counted_by_cause() -> None:
    tally = count(Outcome("error", Answer(), "UNAVAILABLE", "lost", "llm"))
    assert (dict(tally.failed), tally.is_clean) == ({"UNAVAILABLE at llm": 1}, False)


def test_a_refusal_of_a_good_request_is_not_clean() -> None:
    tally = count(Outcome("error", Answer(), "UNAVAILABLE", "no llm is connected", "gateway"))
    assert (tally.refused, tally.is_clean) == (1, False)


@pytest.mark.parametrize(
    ("manner", "code", "name"),
    [
        ("hurried", "DEADLINE_EXCEEDED", "late"),
        ("hurried", "RESOURCE_EXHAUSTED", "refused"),
        ("mistaken", "INVALID_ARGUMENT", "refused"),
        ("mistaken", "NOT_FOUND", "refused"),
    ],
)
def test_refusals_that_a_call_deserves_are_clean(manner: str, code: str, name: str) -> None:
    call = replace(CALL, manner=manner, mistake="model" if manner == "mistaken" else "")
    tally = count(Outcome("error", Answer(), code), call)
    assert (getattr(tally, name), tally.is_clean) == (1, True)


def test_a_deadline_that_was_long_enough_is_a_failure() -> None:
    assert not count(Outcome("error", Answer(), "DEADLINE_EXCEEDED", "late", "llm")).is_clean


def test_a_mistake_that_is_answered_is_a_failure() -> None:
    assert not count(
        Outcome("answered", good_answer()), replace(CALL, manner="mistaken", mistake="model")
    ).is_clean


def test_a_client_that_hangs_up_is_counted_as_cancelled() -> None:
    tally = count(Outcome("hung_up", Answer([5], "a")), replace(CALL, manner="hangs_up"))
    assert (tally.cancelled, tally.is_clean) == (1, True)
