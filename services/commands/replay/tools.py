"""The tools and chat options of a recorded request, and the calls in its messages, as HTTP bodies
have them."""

from typing import Any

import msgspec

from common.chat import ChatOptions
from common.recording import Asked, BadRecording


class Function(msgspec.Struct):
    name: str
    arguments: dict[str, Any]


class ToolCall(msgspec.Struct):
    """A call of an assistant in a recorded prompt, which has the arguments as an object."""

    id: str
    function: Function


class OtherGuide(msgspec.Struct):
    kind: str
    text: str


class ToolGuide(msgspec.Struct):
    """What is read of a guide of kind `tool_calls`."""

    parallel: bool
    required: bool
    otherwise: OtherGuide | None = None


def read_tool_guide(asked: Asked) -> ToolGuide:
    """Return the guide of an answer that may call tools. Raises BadRecording if it is damaged."""
    try:
        return msgspec.json.decode(asked.guide, type=ToolGuide)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRecording(f"the tools of request {asked.number} are damaged ({error})") from None


def chat_fields(asked: Asked) -> dict[str, Any]:
    """Return the fields of a body about tools and the chat template, or raise BadRecording."""
    if not asked.chat_options:
        return {}
    try:
        options = msgspec.json.decode(asked.chat_options, type=ChatOptions)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRecording(f"the tools of request {asked.number} are damaged ({error})") from None
    fields: dict[str, Any] = {}
    if not options.add_generation_prompt:
        fields["add_generation_prompt"] = False
    if options.continue_final_message:
        fields["continue_final_message"] = True
    if options.template_kwargs:
        fields["chat_template_kwargs"] = options.template_kwargs
    if asked.guide_kind != "tool_calls":
        return fields
    guide = read_tool_guide(asked)
    return fields | {
        "tools": options.tools,
        "tool_choice": "required" if guide.required else "auto",
        "parallel_tool_calls": guide.parallel,
    }


def without_tools(asked: Asked) -> Asked:
    """Return the request with only the guide of an answer that calls no tool."""
    if asked.guide_kind != "tool_calls":
        return asked
    other = read_tool_guide(asked).otherwise or OtherGuide("", "")
    return msgspec.structs.replace(asked, guide_kind=other.kind, guide=other.text)


def call_body(call: ToolCall) -> dict[str, Any]:
    """Return a call as a message of a body has it, with the arguments as a text."""
    arguments = msgspec.json.encode(call.function.arguments).decode()
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
