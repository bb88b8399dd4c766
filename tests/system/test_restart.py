"""The only member of a role ends with requests in flight, and is restarted.

The requests wait for the restarted member, and so do those that arrive in the meantime.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.membership import READY
from tests.system.running import (
    RECEIPT,
    Running,
    ask_about,
    lives,
    piece_of,
    text_of,
    until,
)

pytestmark = pytest.mark.system
LONG = {"max_tokens": 200, "ignore_eos": True}
SECOND_DEATH_AT = 50
SHORT = {"max_tokens": 8}


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    with Running("--dtype", "float32", "--max-num-seqs", "2") as running:
        yield running


@pytest.fixture(scope="module")
def long_text(system: Running) -> str:
    """The undisturbed long answer about the receipt."""
    return text_of(system.chat(ask_about(RECEIPT), **LONG)[1])


@pytest.fixture(scope="module")
def short_text(system: Running) -> str:
    return text_of(system.chat(ask_about(RECEIPT), **SHORT)[1])


def pid_of(system: Running, role: str) -> int:
    [member] = until(lambda: system.in_state(role, READY), f"{role} is ready")
    return member.pid


def stream_text(
    system: Running, messages: list[dict[str, Any]], on_text: Callable[[], None], **body: Any
) -> str:
    """Return the text of a streamed answer; calls `on_text` with each piece of text received."""
    text = ""
    for event in system.stream(messages, **body):
        text += piece_of(event)
        if text:
            on_text()
    return text


def kill_once(pid: int, number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    pids = [pid]
    return lambda: os.kill(pids.pop(), number) if pids else None


def is_replaced(system: Running, role: str, before: dict[str, int]) -> bool:
    now = system.pids()
    return system.is_reachable() and now.keys() == before.keys() and now[role] != before[role]


def await_replacement(system: Running, role: str, before: dict[str, int]) -> None:
    until(lambda: is_replaced(system, role, before), f"{role} is back")
    after = system.pids()
    assert after.pop(role) != before.pop(role)
    assert after == before, "no other service was restarted"
    assert system.chat(ask_about(RECEIPT), max_tokens=2)[0] == 200


@pytest.mark.parametrize("role", ["detokenizer", "preprocess", "vision", "controller"])
def test_a_stream_goes_on_while_a_killed_stage_alone_is_restarted(
    system: Running, long_text: str, role: str
) -> None:
    """Preprocess, vision and the controller hold nothing for a request that is being decoded."""
    before = system.pids()
    assert stream_text(system, ask_about(RECEIPT), kill_once(before[role]), **LONG) == long_text
    await_replacement(system, role, before)


def test_a_stream_goes_on_after_two_deaths_of_the_language_group(
    system: Running, long_text: str
) -> None:
    """The second death comes while the restarted group repeats the request."""
    before = system.pids()
    seen: list[int] = []

    def kill() -> None:
        seen.append(len(seen) + 1)
        if len(seen) in (1, SECOND_DEATH_AT):
            os.kill(pid_of(system, "llm"), signal.SIGKILL)

    assert stream_text(system, ask_about(RECEIPT), kill, **LONG) == long_text
    assert len(seen) > SECOND_DEATH_AT
    await_replacement(system, "llm", before)


BODIES: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.0, "seed": 5, **LONG},
    "with logprobs": {"logprobs": True, "top_logprobs": 3, **LONG},
    "with stop": {"stop": ["TOTAL"], "max_tokens": 400},
    "guided": {"response_format": {"type": "json_object"}, "max_tokens": 200},
}


def comparable(answer: dict[str, Any]) -> Any:
    """Return all that must be equal; log-probabilities move with the batch, their tokens do not."""
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    tokens = [entry["token"] for entry in logprobs["content"]] if logprobs else None
    used = {
        name: value for name, value in answer["usage"].items() if name != "prompt_tokens_details"
    }
    return text_of(answer), choice["finish_reason"], used, tokens


def test_requests_of_every_kind_are_answered_as_without_the_death(
    system: Running, short_text: str
) -> None:
    """Some requests are in flight when the language group dies, others arrive afterwards."""
    expected = {
        name: comparable(system.chat(ask_about(RECEIPT), **body)[1])
        for name, body in BODIES.items()
    }
    killed = pid_of(system, "llm")
    begun = threading.Barrier(len(BODIES) + 1)

    def ask(name: str) -> Any:
        begun.wait()
        status, answer = system.chat(ask_about(RECEIPT), **BODIES[name])
        assert status == 200, answer
        return comparable(answer)

    with ThreadPoolExecutor(len(BODIES)) as pool:
        answers = {name: pool.submit(ask, name) for name in BODIES}
        begun.wait()
        until(lambda: sum(m.in_flight for m in system.members("llm")) > 1, "the group is at work")
        os.kill(killed, signal.SIGKILL)
        assert_short_answers(system, short_text)
        assert {name: answer.result() for name, answer in answers.items()} == expected
    system.await_idle()


def assert_short_answers(system: Running, short_text: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: system.chat(ask_about(RECEIPT), **SHORT), range(4)))
    assert [(status, text_of(answer)) for status, answer in answers] == [(200, short_text)] * 4


@pytest.mark.parametrize("role", ["preprocess", "detokenizer", "vision"])
def test_requests_that_arrive_while_a_member_is_restarted_wait_for_it(
    system: Running, short_text: str, role: str
) -> None:
    os.kill(pid_of(system, role), signal.SIGKILL)
    assert_short_answers(system, short_text)
    pid_of(system, role)


def metric(system: Running, name: str) -> float:
    lines = system.get("/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def num_failovers(system: Running) -> float:
    return metric(system, "twinlens_gateway_failovers_total")


@pytest.mark.parametrize("role", ["llm", "detokenizer"])
def test_a_terminated_stage_finishes_what_it_has_and_what_is_on_its_way_to_it(
    system: Running, long_text: str, role: str
) -> None:
    """Two requests run at a time. The others wait when the stage is terminated."""
    until(system.is_reachable, "the system is ready")
    leaving = pid_of(system, role)
    before = num_failovers(system)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(system.chat, ask_about(RECEIPT), **LONG) for _ in range(4)]
        waiting = "twinlens_gateway_requests_waiting"
        until(lambda: metric(system, waiting) == 2, "two answers have begun")
        os.kill(leaving, signal.SIGTERM)
        assert [text_of(answer.result()[1]) for answer in answers] == [long_text] * 4
    assert num_failovers(system) == before, "no request was retried"
    assert pid_of(system, role) != leaving


def test_a_terminated_gateway_answers_the_requests_it_has(system: Running, long_text: str) -> None:
    leaving = pid_of(system, "gateway")
    terminate = kill_once(leaving, signal.SIGTERM)
    assert stream_text(system, ask_about(RECEIPT), terminate, **LONG) == long_text
    until(lambda: not lives(leaving) and system.is_reachable(), "another gateway")


def test_a_killed_gateway_comes_back_and_what_it_owned_is_freed(system: Running) -> None:
    killed = pid_of(system, "gateway")
    events = system.stream(ask_about(RECEIPT), max_tokens=3500, ignore_eos=True)
    next(events)
    os.kill(killed, signal.SIGKILL)
    with contextlib.suppress(OSError):
        list(events)
    until(system.is_reachable, "the gateway is back")
    system.await_idle()
    assert system.chat(ask_about(RECEIPT), max_tokens=2)[0] == 200
