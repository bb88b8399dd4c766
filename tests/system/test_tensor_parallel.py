"""A language group of several processes."""

import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.system.choices import (
    assert_choices_are_single_answers,
    assert_greedy_choices_are_equal,
)
from tests.system.running import GOLDEN, Running, golden_messages, piece_of, text_of, until

pytestmark = pytest.mark.system
CASE = GOLDEN / "c_gqa_tp8"
LONG = {"max_tokens": 200, "ignore_eos": True, "repetition_penalty": 1.0}


def serving(tp: int) -> Running:
    return Running("--model", str(CASE / "checkpoint"), "--dtype", "float32", "--tp", str(tp))


@pytest.fixture(scope="module")
def pair() -> Iterator[Running]:
    """A system whose language group has two ranks."""
    with serving(tp=2) as system:
        yield system


@pytest.fixture(scope="module")
def long_text(pair: Running) -> str:
    """The undisturbed long answer."""
    return text_of(pair.chat(golden_messages(CASE), **LONG)[1])


def assert_reference(system: Running, tp: int) -> None:
    expected = json.loads((CASE / "expected" / "expected.json").read_text())
    assert sorted(m.rank for m in system.members("llm")) == list(range(tp))
    body = {
        "ignore_eos": True,
        "repetition_penalty": 1.0,
        "skip_special_tokens": False,
        "return_token_ids": True,
    }
    _, answer = system.chat(golden_messages(CASE), max_tokens=len(expected["greedy_ids"]), **body)
    assert answer["choices"][0]["token_ids"] == expected["greedy_ids"]


def test_the_answer_of_two_ranks_is_the_reference(pair: Running) -> None:
    assert_reference(pair, tp=2)


def test_several_answers_of_two_ranks_are_those_of_single_requests(pair: Running) -> None:
    assert_choices_are_single_answers(pair)
    assert_greedy_choices_are_equal(pair)


def test_the_answer_of_eight_ranks_is_the_reference() -> None:
    with serving(tp=8) as system:
        assert_reference(system, tp=8)


def pids(system: Running) -> tuple[dict[int, int], set[int]]:
    """Return the process ids of the group by rank, and those of all other members."""
    members = system.members()
    ranks = {m.rank: m.pid for m in members if m.role == "llm"}
    return ranks, {m.pid for m in members if m.role != "llm"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_group_is_lost_with_any_of_its_ranks_and_restarted_and_its_streams_go_on(
    pair: Running, long_text: str, rank: int, number: signal.Signals
) -> None:
    ranks, others = pids(pair)
    events = pair.stream(golden_messages(CASE), **LONG)
    text = ""
    while not text:
        text = piece_of(next(events))
    os.kill(ranks[rank], number)
    assert text + "".join(map(piece_of, events)) == long_text
    until(lambda: is_restarted(pair, ranks), "both ranks of the group are back")
    assert pids(pair)[1] == others, "no other service was restarted"
    assert pair.chat(golden_messages(CASE), max_tokens=2)[0] == 200


def is_restarted(system: Running, before: dict[int, int]) -> bool:
    now, _ = pids(system)
    is_new = now.keys() == before.keys() and not set(now.values()) & set(before.values())
    return is_new and system.is_reachable()
