"""What a request may say about tools, and the texts of refusals."""

import json
from typing import Any

import pytest

from common.errors import InvalidRequest
from services.gateway.generation import GenerationRequest
from services.gateway.tools import Call, join_calls
from tests.gateway.test_schema import HELLO, generation, image_part, refusal

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
F = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": SCHEMA}}
G = {"type": "function", "function": {"name": "g", "strict": True}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = {"mode": mode, "tools": [named(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": tools}


def shown(asked: GenerationRequest) -> list[dict[str, Any]]:
    """Return the tools that the model is shown."""
    tools: list[dict[str, Any]] = (
        json.loads(asked.chat_options)["tools"] if asked.chat_options else []
    )
    return tools


def guide(asked: GenerationRequest) -> tuple[list[str], bool, bool]:
    """Return the functions of a guide, whether one is required, and whether there may be more."""
    assert asked.guide_kind == "tool_calls" and asked.reads_tool_calls
    found = json.loads(asked.guide)
    return [f["name"] for f in found["functions"]], found["required"], found["parallel"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (["f", "g"], False, True)),
        ("auto", (["f", "g"], False, True)),
        ("required", (["f", "g"], True, True)),
        (named("g"), (["g"], True, False)),
        (allowed("auto", "g"), (["g"], False, True)),
        (allowed("required", "g", "f"), (["f", "g"], True, True)),
    ],
)
def test_a_choice_says_which_tools_may_be_called(choice: Any, expected: Any) -> None:
    asked = generation(tools=[F, G], tool_choice=choice)
    assert guide(asked) == expected
    assert [tool["function"]["name"] for tool in shown(asked)] == expected[0]


def test_a_tool_is_shown_and_guided_as_it_was_sent() -> None:
    asked = generation(tools=[F | {"cache_control": {"type": "ephemeral"}}, G])
    assert shown(asked) == [F, G]
    assert json.loads(asked.guide)["functions"] == [
        {"name": "f", "parameters": SCHEMA, "strict": False},
        {"name": "g", "parameters": None, "strict": True},
    ]


def test_parallel_calls_may_be_refused() -> None:
    for choice in ("auto", "required"):
        asked = generation(tools=[F], tool_choice=choice, parallel_tool_calls=False)
        assert guide(asked) == (["f"], choice == "required", False)


def test_an_answer_follows_another_guide_unless_it_calls_a_tool() -> None:
    form = {"type": "json_object"}
    asked = generation(tools=[F], response_format=form)
    assert guide(asked) == (["f"], False, True)
    assert json.loads(asked.guide)["otherwise"] == {"kind": "json_object", "text": ""}
    for choice in ("required", named("f")):
        asked = generation(tools=[F], response_format=form, tool_choice=choice)
        assert "otherwise" not in json.loads(asked.guide)
    asked = generation(tools=[F], response_format=form, tool_choice="none")
    assert asked.guide_kind == "json_object"


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [F], "tool_choice": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "parallel_tool_calls": True},
        {"tool_choice": "none"},
        {"functions": [], "function_call": "auto"},
    ],
)
def test_without_a_tool_to_call_the_answer_is_plain_text(body: dict[str, Any]) -> None:
    asked = generation(**body)
    assert (shown(asked), asked.guide_kind, asked.reads_tool_calls) == ([], "", False)


TOOL = "tools[0].function"
ONE_CALL = "messages[0].tool_calls[0]"


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def call(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{**CALL, **fields}]}]}


def arguments(text: Any) -> dict[str, Any]:
    return call(function={"name": "f", "arguments": text})


@pytest.mark.parametrize(
    ("body", "param", "problem"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "'function'"),
        ({"tools": {}}, "tools", "array"),
        ({"tools": [F | {"colour": 1}]}, "tools[0].colour", "not permitted"),
        (function(name="a b"), f"{TOOL}.name", "pattern"),
        (function(name="a\n"), f"{TOOL}.name", "pattern"),
        (function(name="x" * 129), f"{TOOL}.name", "pattern"),
        (function(colour=1), f"{TOOL}.colour", "not permitted"),
        (function(parameters=[]), f"{TOOL}.parameters", "an object"),
        (function(parameters={"type": "string"}), f"{TOOL}.parameters.type", "object"),
        (function(description=1), f"{TOOL}.description", "string"),
        (function(description="x" * 2**20), "tools", "fewer"),
        ({"tools": [F] * 129}, "tools", "at most 128"),
        ({"tools": [G, F, G]}, "tools[2].function.name", "two tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": named("f")}, "tool_choice.function.name", "not among the tools"),
        ({"tools": [F], "tool_choice": named("h")}, "tool_choice.function.name", "'h' is not"),
        ({"tools": [F], "tool_choice": "any"}, "tool_choice", "allowed_tools"),
        ({"tools": [F], "tool_choice": named("f") | {"x": 1}}, "tool_choice.x", "no such field"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.function.name", "name"),
        (
            {"tools": [F], "tool_choice": allowed("none", "f")},
            "tool_choice.allowed_tools.mode",
            "auto",
        ),
        ({"tools": [F], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "list"),
        (
            {"tools": [F], "tool_choice": allowed("auto", "f", "h")},
            "tool_choice.allowed_tools.tools[1].function.name",
            "'h' is not",
        ),
        ({"tools": [F], "parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
        ({"functions": [F["function"]]}, "functions", "not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "not supported"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "messages[0].tool_call_id", "id"),
        (
            {"messages": [{"role": "user", "tool_call_id": "1"}]},
            "messages[0].tool_call_id",
            "'user'",
        ),
        (
            {"messages": [{"role": "user", "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
            "'user'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": {}}]},
            "messages[0].tool_calls",
            "list",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {}}]},
            "messages[0].function_call",
            "not supported",
        ),
        (call(id=None), ONE_CALL, "id"),
        (call(type="custom"), f"{ONE_CALL}.type", "'custom'"),
        (call(colour=1), f"{ONE_CALL}.colour", "no such field"),
        (call(function={"name": "f"}), f"{ONE_CALL}.function", "arguments"),
        (arguments({}), f"{ONE_CALL}.function", "string"),
        (arguments('{"x": '), f"{ONE_CALL}.function.arguments", "not JSON"),
        (arguments('{"x": NaN}'), f"{ONE_CALL}.function.arguments", "NaN"),
        (arguments("[1]"), f"{ONE_CALL}.function.arguments", "object"),
        (arguments("[" * 100 + "]" * 100), f"{ONE_CALL}.function.arguments", "nest fewer"),
    ],
)
def test_a_refusal_names_the_field(body: dict[str, Any], param: str, problem: str) -> None:
    error = refusal(InvalidRequest, **body)
    assert (error.param, problem in error.message) == (param, True), error.message


def test_a_conversation_with_tools_reaches_the_template() -> None:
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}]},
        {"role": "tool", "tool_call_id": "1", "content": "3", "name": "f"},
        {"role": "tool", "tool_call_id": "2", "content": [image_part(b"plot")]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "tool_calls": []},
    ]
    asked = generation(messages)
    assert json.loads(asked.prompt) == [
        *HELLO,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "tool", "content": [{"type": "image"}], "tool_call_id": "2"},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ]
    assert asked.images == (b"plot",)


def test_no_arguments_may_be_an_empty_text() -> None:
    [message] = json.loads(generation(**arguments("")).prompt)
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_parts_are_joined_and_malformed_calls_left_out() -> None:
    parts = [
        {"index": 0, "id": "a", "name": "f", "arguments": ""},
        {"index": 0, "arguments": '{"x"'},
        {"index": 1, "id": "b", "name": "g", "arguments": "{"},
        {"index": 0, "arguments": ": 1}"},
        {"index": 1, "arguments": "oops", "withdrawn": True},
    ]
    assert join_calls(parts) == [Call("a", "f", '{"x": 1}')]
