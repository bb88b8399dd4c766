"""Conversations in the gRPC API, in the form that a chat template takes."""

from typing import Any

from common.chat import ROLES
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.chat_messages import check_role, encode_messages
from services.gateway.chat_options import make_chat_options
from services.gateway.grpc_tools import read_json
from services.gateway.invalid_field import InvalidField
from services.gateway.limits import MAX_MESSAGES
from services.gateway.tool_messages import read_tool_fields
from services.gateway.tools import ToolUse


def read_chat(chat: inference_pb2.Chat) -> bytes:
    """Return the messages in the form of GenerationRequest.prompt.

    Raises
    ------
    InvalidRequest
        if there are none, or too many, or if one is wrong.
    """
    if not chat.messages:
        raise InvalidField("chat.messages", "missing; send at least one message")
    if sum(1 + len(message.parts) for message in chat.messages) > MAX_MESSAGES:
        problem = f"more than {MAX_MESSAGES} messages and parts are not accepted; send fewer"
        raise InvalidField("chat.messages", problem)
    return encode_messages(
        [read_message(one, f"chat.messages[{n}]") for n, one in enumerate(chat.messages)]
    )


def read_message(message: inference_pb2.ChatMessage, path: str) -> dict[str, Any]:
    """Return a message. A text by itself is its whole content.

    `path` names the message in errors.
    """
    if message.role not in ROLES:
        problem = f"{message.role[:40]!r} is not supported; use {', '.join(ROLES)}"
        raise InvalidField(f"{path}.role", problem)
    parts = [
        read_part(part, message.role, f"{path}.parts[{n}]") for n, part in enumerate(message.parts)
    ]
    match parts:
        case []:
            content: Any = ""
        case [{"type": "text", "text": text}]:
            content = text
        case _:
            content = parts
    calls = [call_of(call) for call in message.tool_calls] or None
    fields = read_tool_fields(message.role, calls, message.tool_call_id or None, path)
    return {"role": ROLES[message.role], "content": content} | fields


def read_part(part: inference_pb2.ContentPart, role: str, path: str) -> dict[str, str]:
    match part.WhichOneof("part"):
        case "text":
            return {"type": "text", "text": part.text}
        case "image" | "video" as kind:
            check_role("an image" if kind == "image" else "a video", role, path)
            return {"type": kind}
    raise InvalidField(path, "must be a text, an image or a video")


def call_of(call: inference_pb2.ToolCall) -> dict[str, Any]:
    """Return a call as OpenAI's clients write it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def read_chat_options(chat: inference_pb2.Chat, tool_use: ToolUse) -> bytes:
    """Return the options of the template, in the form of GenerationRequest.chat_options.

    Raises
    ------
    InvalidRequest
        if they are wrong, or do not fit together.
    """
    path = "chat.template_kwargs"
    variables = read_json(chat.template_kwargs, path) if chat.template_kwargs else {}
    if not isinstance(variables, dict):
        raise InvalidField(path, "must be a JSON object")
    return make_chat_options(
        tool_use.tools,
        chat.messages[-1].role if chat.messages else "",
        chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None,
        chat.continue_final_message,
        variables,
    )
