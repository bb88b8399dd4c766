"""Members that die with answers in progress, where another member can take their place.

The streams go on as if nothing had happened.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from common.membership import READY
from tests.system.choices import (
    NUM_CHOICES,
    Answers,
    assert_choices_are_single_answers,
    assert_greedy_choices_are_equal,
    request_for,
    streamed_answers,
    whole_answers,
)
from tests.system.running import (
    GOLDEN,
    Running,
    golden_messages,
    piece_of,
    text_of,
    until,
)
from tests.system.sampled import sampled_request, sampled_stream, sampled_whole

pytestmark = pytest.mark.system
CASE = GOLDEN / "b_two_images_tied"
NUM_STREAMS = 6
NUM_SAMPLED_STREAMS = 3
TIE = 3e-4
"""In another batch, a random model may choose the other of two tokens that are this near. Questions
with such a near tie in their answer are left out."""
NUM_TOKENS = 200
BODY = {
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
}
SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"]
)
T = TypeVar("T")


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    replicas = ["--llm", "2", "--preprocess", "2", "--detokenizer", "2", "--vision", "2"]
    with Running("--model", str(CASE / "checkpoint"), "--dtype", "float32", *replicas) as running:
        yield running


@pytest.fixture(scope="module")
def texts(system: Running) -> dict[int, str]:
    """The undisturbed answers to questions without a near tie, by number of the question."""
    found = first_clear(lambda n: undisturbed(system, n))
    assert len(found) == NUM_STREAMS
    return found


@pytest.fixture(scope="module")
def sampled(system: Running) -> dict[int, tuple[list[int], str]]:
    """Token ids and text of undisturbed sampled answers without a near tie, by number."""
    found = first_clear(lambda n: sampled_whole(system, sampled_request(n, NUM_TOKENS)))
    assert len(found) >= NUM_SAMPLED_STREAMS
    assert len({tuple(ids) for ids, _ in found.values()}) == len(found), (
        "each question and seed has its own answer"
    )
    return found


def first_clear(ask: Callable[[int], tuple[T, float]]) -> dict[int, T]:
    """Return the first answers without a near tie, given a call that returns answer and gap."""
    clear: dict[int, T] = {}
    for n in range(2 * NUM_STREAMS):
        answer, gap = ask(n)
        if gap > TIE:
            clear[n] = answer
        if len(clear) == NUM_STREAMS:
            break
    return clear


def question(n: int) -> list[dict[str, Any]]:
    *others, user = golden_messages(CASE)
    return [
        *others,
        {**user, "content": [*user["content"], {"type": "text", "text": f"Question {n}."}]},
    ]


def undisturbed(system: Running, n: int) -> tuple[str, float]:
    """Return the text, and the smallest gap between the two best tokens of a step."""
    status, answer = system.chat(question(n), logprobs=True, top_logprobs=2, **BODY)
    assert status == 200, answer
    best = [token["top_logprobs"] for token in answer["choices"][0]["logprobs"]["content"]]
    return text_of(answer), min(first["logprob"] - second["logprob"] for first, second in best)


class Victims:
    """The members of a role, of which `hit_one` hits one at its first call."""

    def __init__(self, system: Running, role: str, number: signal.Signals) -> None:
        self.pids = [member.pid for member in system.members(role)]
        self.number = number
        self.hit = list[int]()

    def hit_one(self) -> None:
        if not self.hit:
            self.hit.append(self.pids.pop())
            os.kill(self.hit[0], self.number)

    def thaw(self) -> None:
        assert len(self.hit) == 1
        if self.number == signal.SIGSTOP:
            os.kill(self.hit[0], signal.SIGCONT)


def await_recovery(system: Running, role: str) -> None:
    until(
        lambda: [m.state for m in system.members(role)] == [READY, READY],
        f"two ready members of {role} again",
    )
    system.await_idle()


def ask_all(numbers: dict[int, T], ask: Callable[[int], T]) -> dict[int, T]:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return dict(zip(numbers, pool.map(ask, numbers), strict=True))


@pytest.mark.parametrize("role", ["llm", "detokenizer", "preprocess"])
@SIGNALS
def test_streams_go_on_without_a_token_repeated_missing_or_changed(
    system: Running, texts: dict[int, str], role: str, number: signal.Signals
) -> None:
    victims = Victims(system, role, number)

    def ask(n: int) -> str:
        text = ""
        for event in system.stream(question(n), **BODY):
            text += piece_of(event)
            if n == min(texts) and text:
                victims.hit_one()
        return text

    assert ask_all(texts, ask) == texts
    victims.thaw()
    await_recovery(system, role)


@SIGNALS
def test_sampled_streams_go_on_with_the_draws_that_they_would_have_had(
    system: Running, sampled: dict[int, tuple[list[int], str]], number: signal.Signals
) -> None:
    victims = Victims(system, "llm", number)

    def ask(n: int) -> tuple[list[int], str]:
        return sampled_stream(
            system,
            sampled_request(n, NUM_TOKENS),
            lambda count: victims.hit_one() if count > 20 else None,
        )

    assert ask_all(sampled, ask) == sampled
    victims.thaw()
    await_recovery(system, "llm")


def test_calls_of_tools_go_on_without_a_part_repeated_or_missing(system: Running) -> None:
    """The schema leaves the model no choice, so there is no near tie."""
    text = "".join(map(str, range(100)))
    schema = {"type": "object", "properties": {"s": {"const": text}}, "required": ["s"]}
    schema["additionalProperties"] = False
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    victims = Victims(system, "llm", signal.SIGKILL)

    def ask(n: int) -> tuple[list[str], Any, list[str]]:
        parts: list[dict[str, Any]] = []
        ends: list[str] = []
        for event in system.stream(question(n), **body):
            [choice] = event["choices"]
            parts += choice["delta"].get("tool_calls", [])
            ends += [reason for reason in [choice["finish_reason"]] if reason]
            if len(parts) > 20:
                victims.hit_one()
        names = [part["function"]["name"] for part in parts if "id" in part]
        arguments = "".join(part["function"]["arguments"] for part in parts)
        return names, json.loads(arguments), ends

    expected = (["f"], {"s": text}, ["tool_calls"])
    numbers = dict.fromkeys(range(NUM_STREAMS), expected)
    assert ask_all(numbers, ask) == numbers
    assert victims.hit
    await_recovery(system, "llm")


def test_several_answers_are_those_of_single_requests(system: Running) -> None:
    assert_choices_are_single_answers(system)
    assert_greedy_choices_are_equal(system)


@pytest.mark.parametrize("role", ["llm", "detokenizer", "preprocess"])
def test_several_answers_to_a_request_go_on_each_after_its_own_tokens(
    system: Running, role: str
) -> None:
    requests = [request_for(n, NUM_TOKENS // 2, NUM_CHOICES) for n in range(2 * NUM_STREAMS)]
    clear = first_clear(lambda n: whole_answers(system, requests[n]))
    victims = Victims(system, role, signal.SIGKILL)

    def ask(n: int) -> Answers:
        def on_tokens(count: int) -> None:
            if count > 20 or role == "preprocess":
                victims.hit_one()

        return streamed_answers(system, requests[n], on_tokens)

    assert ask_all(clear, ask) == clear
    await_recovery(system, role)
