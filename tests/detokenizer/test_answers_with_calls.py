"""The detokenizer takes tool calls out of answers, and an answer with calls ends as one."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.events import Event
from common.messages import Delta, StopFound
from common.vocabulary import Vocabulary
from common.wire import Tensor
from services.detokenizer.tool_calls import call_id
from tests.detokenizer.test_worker import VOCABULARY, Detokenizer, ids_of, start, tokens

OPEN = VOCABULARY.id_of("<tool_call>")
CLOSE = VOCABULARY.id_of("</tool_call>")
BODY = ids_of('\n{"name": "f", "arguments": {"s":"STOP"}}\n')
ANSWER = [*ids_of("Look: "), OPEN, *BODY, CLOSE]
FIRST = {"index": 0, "id": call_id("r", 0), "name": "f"}


def asked(**stopping: Any) -> list[Event]:
    """Return the start of an answer whose calls are read."""
    [event] = start(**stopping)
    event.message.reads_tool_calls = True
    return [event]


def parts(deltas: list[Delta]) -> list[dict[str, Any]]:
    return [part for d in deltas if d.tool_calls for part in json.loads(d.tool_calls.text())]


def joined(deltas: list[Delta]) -> tuple[str, str, str]:
    """Return the text, the arguments of the only call, and the finish reason."""
    arguments = "".join(part["arguments"] for part in parts(deltas))
    text = "".join(d.text.text() + "".join(p.get("text", "") for p in parts([d])) for d in deltas)
    return text, arguments, deltas[-1].finish_reason


def test_a_call_comes_apart_from_the_text_and_is_the_reason_of_the_end() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(asked(), tokens(0, ANSWER), tokens(len(ANSWER), ids_of("x"), "stop"))
    assert joined(detokenizer.deltas) == ("Look: x", '{"s":"STOP"}', "tool_calls")
    assert parts(detokenizer.deltas) == [FIRST | {"arguments": '{"s":"STOP"}'}]


def test_calls_stay_in_the_text_of_an_answer_that_may_call_no_tool() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(start(), tokens(0, ANSWER, "stop"))
    [delta] = detokenizer.deltas
    assert (delta.tool_calls, delta.finish_reason) == (None, "stop")
    assert delta.text.text().startswith("Look: <tool_call>")


@pytest.mark.parametrize(
    ("length", "reason", "expected"),
    [
        (len(ANSWER), "length", ("Look: ", '{"s":"STOP"}', "length")),
        (len(ANSWER) - 6, "length", ("Look: ", '{"s":"STO', "length")),
        (len(ANSWER) - 6, "stop", ("Look: ", '{"s":"STO', "stop")),
        (10, "stop", ('Look: <tool_call>\n{"', "", "stop")),
    ],
)
def test_an_answer_that_is_cut_off_is_delivered_as_it_came(
    length: int, reason: str, expected: tuple[str, str, str]
) -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(asked(), tokens(0, ANSWER[:length], reason))
    assert joined(detokenizer.deltas) == expected


def test_a_stop_string_ends_an_answer_inside_a_call_too() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(asked(stop=("STOP",)), tokens(0, ANSWER))
    assert joined(detokenizer.deltas) == ("Look: ", '{"s":"', "stop")
    assert detokenizer.member.links.of(StopFound)


def with_special_marks() -> Vocabulary:
    """Return a vocabulary in which the marks of a call are special tokens."""
    return replace(VOCABULARY, special_ids=VOCABULARY.special_ids | {OPEN, CLOSE})


def test_marks_are_seen_if_they_are_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.detokenizer.test_worker.VOCABULARY", with_special_marks())
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(asked(skip_special_tokens=True), tokens(0, ANSWER, "stop"))
    assert joined(detokenizer.deltas) == ("Look: ", '{"s":"STOP"}', "tool_calls")


def test_each_token_has_its_log_probability_whatever_its_text_becomes() -> None:
    detokenizer = Detokenizer("gateway-1")
    detokenizer.play(asked(), *[tokens(n, [id], logprobs=True) for n, id in enumerate(ANSWER)])
    for delta in detokenizer.deltas:
        assert delta.logprobs is not None
        [entry] = json.loads(delta.logprobs.text())
        assert [entry["token_id"]] == delta.token_ids.numpy().tolist()


@pytest.mark.parametrize("num_delivered", range(1, len(ANSWER)))
def test_an_answer_with_a_call_continues_at_another_detokenizer(num_delivered: int) -> None:
    whole = Detokenizer("gateway-1")
    ends = ["stop" if n == len(ANSWER) - 1 else "" for n in range(len(ANSWER))]
    each = [tokens(n, [id], end) for n, (id, end) in enumerate(zip(ANSWER, ends, strict=True))]
    whole.play(asked(), *each)
    first = Detokenizer("gateway-1")
    first.play(asked(), *each[:num_delivered])
    second = Detokenizer("gateway-1")
    [begun] = asked()
    begun.message.attempt = 1
    begun.message.output_token_ids = Tensor.of(np.array(ANSWER[:num_delivered], np.int64))
    for [event] in each[num_delivered:]:
        event.message.attempt = 1
    second.play([begun], *each[num_delivered:])
    both = first.deltas + second.deltas
    assert joined(both) == joined(whole.deltas) == ("Look: ", '{"s":"STOP"}', "tool_calls")
    assert parts(both) == parts(whole.deltas)
