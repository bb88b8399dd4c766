"""Tools in the gRPC API."""

from typing import Any

import pytest

from common.errors import InvalidRequest
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.grpc_tools import read_chat_tools
from tests.contract.test_openai_tools import MALFORMED, TWO_CALLS
from tests.gateway.fake_core import FakeCore
from tests.gateway.test_grpc import channel, core, request, stream_request, stub

__all__ = ["channel", "core", "stub"]

TOOL = inference_pb2.Tool(name="f", description="F.", parameters='{"type": "object"}')
CALLS = [("call_1", "add", "{}"), ("call_2", "subtract", '{"a":1}')]


def chat(**fields: Any) -> inference_pb2.Chat:
    return inference_pb2.Chat(**{"tools": [TOOL, inference_pb2.Tool(name="g")], **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (["f", "g"], False, True)),
        ({"tool_mode": inference_pb2.TOOL_MODE_REQUIRED}, (["f", "g"], True, True)),
        ({"tool_name": "g"}, (["g"], True, False)),
        ({"parallel_tool_calls": False}, (["f", "g"], False, False)),
    ],
)
def test_a_choice_says_which_tools_may_be_called(fields: dict[str, Any], expected: Any) -> None:
    use = read_chat_tools(chat(**fields))
    guide = use.guide
    names = [function["name"] for function in guide["functions"]]
    assert (names, guide["required"], guide["parallel"]) == expected
    assert [tool["function"]["name"] for tool in use.tools] == names


def test_without_a_tool_to_call_the_answer_is_plain_text() -> None:
    for fields in ({"tools": []}, {"tool_mode": inference_pb2.TOOL_MODE_NONE}):
        use = read_chat_tools(chat(**fields))
        assert (use.tools, use.guide) == ((), {})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tools": [inference_pb2.Tool()]}, "chat.tools[0]"),
        ({"tools": [inference_pb2.Tool(name="f", parameters="{")]}, "chat.tools[0].parameters"),
        ({"tools": [inference_pb2.Tool(name="f", parameters="[]")]}, "chat.tools[0]"),
        ({"tools": [TOOL, TOOL]}, "two tools"),
        ({"tools": [inference_pb2.Tool(name=f"f{n}") for n in range(129)]}, "chat.tools"),
        ({"tool_name": "h"}, "'h' is not among the tools"),
        ({"tool_mode": 9}, "chat.tool_mode"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_chat_tools(chat(**fields))
    assert problem in caught.value.message


async def test_calls_come_whole(stub: Any, core: FakeCore) -> None:
    core.script = tuple(TWO_CALLS)
    answer = await stub.Generate(request())
    assert answer.finish_reason == inference_pb2.FINISH_REASON_TOOL_CALLS
    assert answer.text == "Both: "
    assert [(call.id, call.name, call.arguments) for call in answer.tool_calls] == CALLS
    core.script = tuple(MALFORMED)
    answer = await stub.Generate(request())
    assert (answer.text, list(answer.tool_calls)) == ("<tool_call>{oops", [])


async def test_calls_come_in_parts(stub: Any, core: FakeCore) -> None:
    core.script = tuple(TWO_CALLS)
    events = [event async for event in stub.GenerateStream(stream_request())]
    parts = [
        (part.index, part.id, part.name, part.arguments)
        for event in events
        for part in event.delta.tool_calls
    ]
    assert parts == [
        (0, "call_1", "add", "{}"),
        (1, "call_2", "subtract", ""),
        (1, "", "", '{"a":1}'),
    ]
    assert events[-1].end.finish_reason == inference_pb2.FINISH_REASON_TOOL_CALLS
