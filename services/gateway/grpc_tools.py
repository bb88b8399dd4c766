"""Tools in the gRPC API, to and from the types of `tools.py`."""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from common.errors import InvalidRequest
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.generation import Piece
from services.gateway.invalid_field import InvalidField, explain_body_error
from services.gateway.json_bounds import check_json
from services.gateway.tools import MAX_TOOLS, Tool, ToolUse, join_calls, read_tool_use

MODES = {
    inference_pb2.TOOL_MODE_UNSPECIFIED: "auto",
    inference_pb2.TOOL_MODE_NONE: "none",
    inference_pb2.TOOL_MODE_REQUIRED: "required",
}


def read_chat_tools(chat: inference_pb2.Chat) -> ToolUse:
    """Return what a conversation asks for of tools, or raise InvalidRequest."""
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidField("chat.tools", f"more than {MAX_TOOLS} tools; send fewer")
    tools = [read_tool(tool, f"chat.tools[{n}]") for n, tool in enumerate(chat.tools)]
    parallel = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else None
    return read_tool_use(tools, read_choice(chat), parallel)


def read_choice(chat: inference_pb2.Chat) -> Any:
    """Return the choice as OpenAI's clients write it."""
    if chat.WhichOneof("tool_choice") == "tool_name":
        return {"type": "function", "function": {"name": chat.tool_name}}
    if chat.tool_mode not in MODES:
        raise InvalidField("chat.tool_mode", "there is no such mode")
    return MODES[chat.tool_mode]


def read_tool(tool: inference_pb2.Tool, path: str) -> Tool:
    function = {"name": tool.name, "description": tool.description or None}
    if tool.parameters:
        function["parameters"] = read_json(tool.parameters, f"{path}.parameters")
    try:
        return Tool.model_validate({"type": "function", "function": function})
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {explain_body_error(error).message}", "gateway") from None


def read_json(text: str, path: str) -> Any:
    """Return the JSON in a field, or raise InvalidRequest."""
    check_json(text.encode())
    try:
        return json.loads(text)
    except ValueError as e:
        raise InvalidField(path, f"this is not JSON: {e}") from None


def tool_call_messages(pieces: Iterable[Piece]) -> list[inference_pb2.ToolCall]:
    """Return the calls of a whole answer."""
    calls = join_calls(part for piece in pieces for part in piece.tool_calls)
    return [
        inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
        for call in calls
    ]


def tool_call_deltas(piece: Piece) -> list[inference_pb2.ToolCallDelta]:
    """Return the parts of calls of a piece."""
    return [
        inference_pb2.ToolCallDelta(
            index=part["index"],
            id=part.get("id", ""),
            name=part.get("name", ""),
            arguments=part["arguments"],
        )
        for part in piece.tool_calls
        if "id" in part or part["arguments"]
    ]
