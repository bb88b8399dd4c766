"""The only member of a role dies with requests under way: they wait for the restarted one, and so
do those that come meanwhile."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.running import (
    GOLDEN,
    RECEIPT,
    Running,
    ask_about,
    golden_messages,
    lives,
    text_of,
    until,
)
from tests.system.test_faults import reachable

pytestmark = pytest.mark.system
LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    with Running("--dtype", "float32", "--max-num-seqs", "2") as running:
        yield running


def pid_of(system: Running, role: str, rank: int = 0) -> int:
    return until(
        lambda: [
            m["pid"] for m in system.members(role) if m["state"] == "ready" and m["rank"] == rank
        ],
        f"{role} is ready",
    )[0]


def stream_text(
    system: Running, messages: list[dict[str, Any]], on_text: Callable[[], None], **body: Any
) -> str:
    text = ""
    for event in system.stream(messages, **body):
        assert "error" not in event, event
        text += event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""
        if text:
            on_text()
    return text


def kill_once(pid: int, number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    pids = [pid]
    return lambda: os.kill(pids.pop(), number) if pids else None


@pytest.mark.parametrize("role", ["llm", "detokenizer"])
def test_a_stream_goes_on_at_the_restarted_member(system: Running, role: str) -> None:
    expected = text_of(system.chat(ask_about(RECEIPT), **LONG)[1])
    killed = pid_of(system, role)
    assert stream_text(system, ask_about(RECEIPT), kill_once(killed), **LONG) == expected
    assert pid_of(system, role) != killed


def test_it_goes_on_twice(system: Running) -> None:
    """The second time in the middle of what the first restart began anew."""
    expected = text_of(system.chat(ask_about(RECEIPT), **LONG)[1])
    seen: list[int] = []

    def kill() -> None:
        kill_at = {1: 0, 100: 1}
        seen.append(len(seen) + 1)
        if len(seen) in kill_at:
            os.kill(pid_of(system, "llm"), signal.SIGKILL)

    assert stream_text(system, ask_about(RECEIPT), kill, **LONG) == expected
    assert len(seen) > 100


BODIES: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.0, "seed": 5, **LONG},
    "with logprobs": {"logprobs": True, "top_logprobs": 3, **LONG},
    "with stop": {"stop": ["TOTAL"], "max_tokens": 400},
    "guided": {"response_format": {"type": "json_object"}, "max_tokens": 200},
}


def shown(answer: dict[str, Any]) -> Any:
    """All that a client can compare: log-probabilities move with the batch, their tokens do not."""
    choice = answer["choices"][0]
    tokens = (
        [entry["token"] for entry in choice["logprobs"]["content"]] if choice["logprobs"] else None
    )
    used = {
        name: value for name, value in answer["usage"].items() if name != "prompt_tokens_details"
    }
    return text_of(answer), choice["finish_reason"], used, tokens


def test_whatever_was_asked_for_is_answered_as_without_the_death(system: Running) -> None:
    expected = {
        name: shown(system.chat(ask_about(RECEIPT), **body)[1]) for name, body in BODIES.items()
    }
    killed = pid_of(system, "llm")
    begun = threading.Barrier(len(BODIES) + 1)

    def ask(name: str) -> Any:
        begun.wait()
        status, answer = system.chat(ask_about(RECEIPT), **BODIES[name])
        assert status == 200, answer
        return shown(answer)

    with ThreadPoolExecutor(len(BODIES)) as pool:
        answers = {name: pool.submit(ask, name) for name in BODIES}
        begun.wait()
        until(
            lambda: sum(m["in_flight"] for m in system.members("llm")) > 1, "the group is at work"
        )
        os.kill(killed, signal.SIGKILL)
        assert {name: answer.result() for name, answer in answers.items()} == expected
    until(
        lambda: all(m["in_flight"] + m["queued"] == 0 for m in system.members()), "nothing is held"
    )


@pytest.mark.parametrize("role", ["llm", "preprocess", "detokenizer", "vision"])
def test_who_comes_while_a_member_is_restarted_waits_for_it(system: Running, role: str) -> None:
    expected = text_of(system.chat(ask_about(RECEIPT), max_tokens=8)[1])
    os.kill(pid_of(system, role), signal.SIGKILL)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: system.chat(ask_about(RECEIPT), max_tokens=8), range(4)))
    assert [(status, text_of(answer)) for status, answer in answers] == [(200, expected)] * 4
    pid_of(system, role)


def num_failovers(system: Running) -> float:
    lines = system.get("/metrics")[1].splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("twinlens_failovers_total")
    )


@pytest.mark.parametrize("role", ["llm", "detokenizer"])
def test_a_stage_that_is_terminated_finishes_what_it_has_and_what_is_on_its_way_to_it(
    system: Running, role: str
) -> None:
    """Two answers at a time: the others have not begun when the stage is told to leave."""
    expected = text_of(system.chat(ask_about(RECEIPT), **LONG)[1])
    until(lambda: system.get("/readyz")[0] == 200, "all are there")
    leaving = pid_of(system, role)
    before = num_failovers(system)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(system.chat, ask_about(RECEIPT), **LONG) for _ in range(6)]
        until(lambda: [m["queued"] for m in system.members("llm")] == [4], "two answers have begun")
        os.kill(leaving, signal.SIGTERM)
        assert [text_of(answer.result()[1]) for answer in answers] == [expected] * 6
    assert num_failovers(system) == before, "nothing was begun anew"
    assert pid_of(system, role) != leaving


def test_a_gateway_that_is_terminated_answers_whom_it_has(system: Running) -> None:
    expected = text_of(system.chat(ask_about(RECEIPT), **LONG)[1])
    leaving = pid_of(system, "gateway")
    assert (
        stream_text(system, ask_about(RECEIPT), kill_once(leaving, signal.SIGTERM), **LONG)
        == expected
    )
    until(lambda: not lives(leaving) and reachable(system), "another gateway")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_group_of_several_ranks_is_lost_with_any_of_them_and_its_streams_go_on(
    rank: int, number: signal.Signals
) -> None:
    case = GOLDEN / "c_gqa_tp8"
    with Running("--model", str(case / "checkpoint"), "--dtype", "float32", "--tp", "2") as system:
        messages = golden_messages(case)
        body = {"max_tokens": 200, "ignore_eos": True, "repetition_penalty": 1.0}
        expected = text_of(system.chat(messages, **body)[1])
        ranks = {m["pid"] for m in system.members("llm")}
        assert (
            stream_text(system, messages, kill_once(pid_of(system, "llm", rank), number), **body)
            == expected
        )
        assert pid_of(system, "llm", 0) not in ranks and pid_of(system, "llm", 1) not in ranks, (
            "both ranks began anew"
        )
