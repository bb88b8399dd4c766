"""The openai client calls tools through a real HTTP server with a scripted core."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from services.gateway.generation import Began, Ended, Piece
from tests.gateway.fake_core import HELLO, FakeCore, Step, http_server

ASK: Any = {"model": "org/tiny", "messages": [{"role": "user", "content": "3 + 4?"}]}
NAMES = ("add", "subtract")
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            },
        },
    }
    for name in NAMES
]
ENDED = HELLO[-1]
assert isinstance(ENDED, Ended)


def part(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    return {"index": index, "arguments": arguments, **more}


def pieces(*contents: tuple[str, list[dict[str, Any]]], reason: str = "tool_calls") -> list[Step]:
    """Return the script of an answer with these texts and parts of calls."""
    events = [Piece(n, [n], text, [], parts) for n, (text, parts) in enumerate(contents)]
    return [Began(None), *events, Ended(reason, ENDED.usage, ENDED.timings)]


ONE_CALL = pieces(
    ("", []),
    ("", [part(0, "", id="call_1", name="add")]),
    ("", [part(0, '{"a":3')]),
    ("", [part(0, ',"b":4}')]),
)
TWO_CALLS = pieces(
    ("Both: ", [part(0, "{}", id="call_1", name="add")]),
    ("", [part(1, "", id="call_2", name="subtract")]),
    ("", [part(1, '{"a":1}')]),
)
MALFORMED = pieces(
    ("", [part(0, "{", id="call_1", name="add")]),
    ("", [part(0, "", withdrawn=True)]),
    ("<tool_call>{oops", []),
    reason="stop",
)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
async def client(core: FakeCore) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        http_server(core) as port,
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=10
        ) as client,
    ):
        yield client


async def whole(client: openai.AsyncOpenAI, **body: Any) -> tuple[str | None, Any, str]:
    """Return the text, the (name, arguments) of each call, and the finish reason."""
    answer = await client.chat.completions.create(**ASK, **body)
    message = answer.choices[0].message
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or []]
    return message.content, calls, answer.choices[0].finish_reason


async def streamed(client: openai.AsyncOpenAI, **body: Any) -> tuple[str | None, Any, str]:
    """Return the same of a stream, as the client's own helper joins it."""
    async with client.chat.completions.stream(**ASK, **body) as stream:
        answer = await stream.get_final_completion()
    message = answer.choices[0].message
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or []]
    return message.content, calls, answer.choices[0].finish_reason


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_calls_come_whole_and_streamed(
    client: openai.AsyncOpenAI, core: FakeCore, choice: str
) -> None:
    core.script = tuple(ONE_CALL)
    body = {"tools": TOOLS, "tool_choice": choice}
    called = [("add", '{"a":3,"b":4}')]
    assert await whole(client, **body) == (None, called, "tool_calls")
    assert await streamed(client, **body) == ("", called, "tool_calls")
    core.script = tuple(TWO_CALLS)
    called = [("add", "{}"), ("subtract", '{"a":1}')]
    assert await whole(client, **body) == ("Both: ", called, "tool_calls")
    assert await streamed(client, **body) == ("Both: ", called, "tool_calls")


async def test_the_call_of_a_named_tool_ends_with_stop(
    client: openai.AsyncOpenAI, core: FakeCore
) -> None:
    core.script = tuple(ONE_CALL)
    body = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}}
    assert (await whole(client, **body))[2] == "stop"
    assert (await streamed(client, **body))[2] == "stop"


async def test_a_stream_has_one_finish_reason_and_names_a_call_once(
    client: openai.AsyncOpenAI, core: FakeCore
) -> None:
    core.script = tuple(ONE_CALL)
    stream = await client.chat.completions.create(**ASK, tools=TOOLS, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["tool_calls"]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(d.index, d.id, d.type) for d in deltas] == [
        (0, "call_1", "function"),
        (0, None, None),
        (0, None, None),
    ]
    functions = [d.function for d in deltas if d.function]
    assert [(f.name, f.arguments) for f in functions] == [
        ("add", ""),
        (None, '{"a":3'),
        (None, ',"b":4}'),
    ]


async def test_a_malformed_call_is_text(client: openai.AsyncOpenAI, core: FakeCore) -> None:
    core.script = tuple(MALFORMED)
    assert await whole(client, tools=TOOLS) == ("<tool_call>{oops", [], "stop")
    text, _, reason = await streamed(client, tools=TOOLS)
    assert (text, reason) == ("<tool_call>{oops", "stop")


async def test_a_whole_loop(client: openai.AsyncOpenAI, core: FakeCore) -> None:
    """The client sends back the message with the call just as it got it."""
    core.script = tuple(ONE_CALL)
    messages = list(ASK["messages"])
    answer = await client.chat.completions.create(model="org/tiny", messages=messages, tools=TOOLS)
    message = answer.choices[0].message
    [call] = message.tool_calls or []
    assert call.type == "function"
    result = sum(json.loads(call.function.arguments).values())
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": str(result)}]
    core.script = HELLO
    answer = await client.chat.completions.create(model="org/tiny", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "Hello"
    _, assistant, tool = json.loads(core.requests[1].prompt)
    function = {"name": "add", "arguments": {"a": 3, "b": 4}}
    assert assistant["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]
    assert tool == {"role": "tool", "content": "7", "tool_call_id": "call_1"}


async def test_a_pydantic_model_can_be_a_tool(client: openai.AsyncOpenAI, core: FakeCore) -> None:
    from pydantic import BaseModel

    class Sum(BaseModel):
        a: float
        b: float

    tool = openai.pydantic_function_tool(Sum, name="add")
    core.script = tuple(ONE_CALL)
    answer = await client.chat.completions.parse(**ASK, tools=[tool])
    [call] = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Sum(a=3, b=4)
    assert json.loads(core.requests[0].guide)["functions"][0]["strict"] is True
