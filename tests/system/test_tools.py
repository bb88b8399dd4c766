"""The embedded model calls tools, because a grammar makes it."""

import json
from typing import Any

import pytest

from tests.system.running import RECEIPT, Running, ask_about

pytestmark = pytest.mark.system
FORM = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 12},
        "page": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["text", "page"],
    "additionalProperties": False,
}
FILE = {"type": "function", "function": {"name": "file_invoice", "parameters": FORM}}
STOP = {"type": "function", "function": {"name": "stop"}}
ASK = ask_about(RECEIPT)


def call(system: Running, **body: Any) -> tuple[dict[str, Any], str]:
    """Return the message of an answer, and its finish reason."""
    status, answer = system.chat(ASK, **{"tools": [FILE, STOP], "max_tokens": 300, **body})
    assert status == 200, answer
    [choice] = answer["choices"]
    return choice["message"], choice["finish_reason"]


def is_form(arguments: str) -> bool:
    found = json.loads(arguments)
    return found.keys() == {"text", "page"} and len(found["text"]) <= 12 and 1 <= found["page"] <= 9


def test_a_required_call_follows_the_schema_and_streams_the_same(embedded: Running) -> None:
    body = {"tool_choice": "required", "parallel_tool_calls": False, "tools": [FILE]}
    message, reason = call(embedded, **body)
    [called] = message["tool_calls"]
    assert (message["content"], reason) == (None, "tool_calls")
    assert called["function"]["name"] == "file_invoice" and is_form(called["function"]["arguments"])
    chunks = [c for e in embedded.stream(ASK, max_tokens=300, **body) for c in e["choices"]]
    parts = [part for chunk in chunks for part in chunk["delta"].get("tool_calls", [])]
    assert (
        "".join(part["function"]["arguments"] for part in parts) == called["function"]["arguments"]
    )
    assert len(parts) > 3, "arguments come while they are written"
    assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["tool_calls"]


def test_a_named_tool_is_called(embedded: Running) -> None:
    choice = {"type": "function", "function": {"name": "stop"}}
    message, reason = call(embedded, tool_choice=choice)
    [called] = message["tool_calls"]
    assert (called["function"]["name"], reason) == ("stop", "stop")
    assert json.loads(called["function"]["arguments"]) == {}


def test_several_calls_are_possible(embedded: Running) -> None:
    message, reason = call(embedded, tool_choice="required", tools=[STOP], max_tokens=2000)
    assert reason == "tool_calls" and 1 <= len(message["tool_calls"]) <= 16
    assert len({called["id"] for called in message["tool_calls"]}) == len(message["tool_calls"])


def test_a_call_that_is_cut_off_is_delivered_as_it_came(embedded: Running) -> None:
    body = {"tool_choice": "required", "tools": [FILE]}
    whole, _ = call(embedded, **body)
    arguments = whole["tool_calls"][0]["function"]["arguments"]
    message, reason = call(embedded, **body, max_tokens=60)
    [called] = message["tool_calls"]
    assert reason == "length" and 0 < len(called["function"]["arguments"]) < len(arguments)
    assert arguments.startswith(called["function"]["arguments"])
    message, reason = call(embedded, **body, max_tokens=5)
    assert (message["content"], reason) == ("<tool", "length")


def test_without_a_tool_to_call_the_answer_is_the_one_without_tools(embedded: Running) -> None:
    _, plain = embedded.chat(ASK)
    message, reason = call(embedded, tool_choice="none")
    assert (message["content"], reason) == (plain["choices"][0]["message"]["content"], "stop")


def test_a_model_may_answer_with_a_text_instead(embedded: Running) -> None:
    message, reason = call(embedded, tool_choice="auto")
    assert message["content"] and reason in ("stop", "length")


def test_parameters_that_no_call_can_follow_are_refused(embedded: Running) -> None:
    bad = {"name": "bad", "parameters": {"$ref": "https://example.org/schema.json"}}
    tools = [{"type": "function", "function": bad}]
    status, answer = embedded.chat(ASK, tools=tools, tool_choice="required")
    assert (status, "the parameters of bad" in answer["error"]["message"]) == (400, True)
