"""The body of POST /v1/responses, and its translation to a chat.

An error in the chat that comes of a body names the field of the body that it comes from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from common.errors import InvalidRequest
from services.gateway.chat_messages import Body
from services.gateway.invalid_field import InvalidField
from services.gateway.json_bodies import read_body
from services.gateway.responses.items import InputReader
from services.gateway.schema import ChatRequest, read_chat
from services.gateway.unsupported import refuse_unsupported

NOT_STORED = "responses are not stored here; send the whole conversation in input"
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")
"""What `include` may name. No answer has the second one."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "prompt": (),
    "n": (1,),
    "best_of": (1,),
}
"""Fields that are refused, with the values that are accepted."""
RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "tool_choice.function": "tool_choice",
}
"""The fields of a chat, and the fields of a body that they come from."""


class TextFormat(Body):
    type: str
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class FunctionTool(Body):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ReasoningOptions(Body):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class StreamOptions(Body):
    include_obfuscation: bool | None = None
    """Asks for random padding against an observer of the network. There is none."""


class ResponsesRequest(Body):
    """The body of a response.

    Sampling values, and whatever else a chat completion takes, are among the extra fields.
    """

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31)
    max_tool_calls: int | None = None
    """Counts calls of tools that the server runs. There are none."""
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: ReasoningOptions | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    temperature: float | None = None
    text: TextOptions | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[FunctionTool] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    truncation: str | None = None
    user: str | None = None

    @property
    def num_items(self) -> int:
        """The number of items of the input, at least 1."""
        return max(1, len(self.input)) if isinstance(self.input, list) else 1

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or []) or bool(self.top_logprobs)


@dataclass(frozen=True, slots=True)
class ResponsesChat:
    """The chat of a body, and where its parts come from."""

    chat: ChatRequest
    names: Mapping[str, str]
    """The paths of the chat's messages and tools, and the paths in the body that they come from."""

    def explain(self, error: InvalidField) -> InvalidRequest:
        """Return the error about a field of the chat as one about a field of the body."""
        return renamed(error, self.names)


def parse_responses(body: bytes | bytearray) -> ResponsesRequest:
    """Return the body of a response, or raise InvalidRequest."""
    request = read_body(body, ResponsesRequest)
    if request.previous_response_id:
        raise InvalidField("previous_response_id", NOT_STORED)
    if request.truncation not in (None, "auto", "disabled"):
        raise InvalidField("truncation", "must be auto or disabled")
    for name in request.include or []:
        if name not in INCLUDABLE:
            raise InvalidField("include", f"{name[:60]!r} is not supported; send {LOGPROBS!r}")
    check_reasoning(request.reasoning)
    check_text(request.text)
    refuse_unsupported(request.model_extra or {}, UNSUPPORTED)
    for path, part in (("stream_options", request.stream_options), ("text", request.text)):
        refuse_unknown(part, path)
    if request.stream_options and not request.stream:
        raise InvalidField("stream_options", "is allowed with stream: true only")
    return request


def check_reasoning(reasoning: ReasoningOptions | None) -> None:
    """Raise InvalidField if the client wants the model to reason, which no served model does."""
    if reasoning is None:
        return
    refuse_unknown(reasoning, "reasoning")
    if reasoning.effort not in (None, "none"):
        raise InvalidField(
            "reasoning.effort", "the model does not reason; send none, or leave it out"
        )


def check_text(text: TextOptions | None) -> None:
    if text is None:
        return
    if text.verbosity not in (None, "medium"):
        raise InvalidField("text.verbosity", "is not supported; send medium, or leave it out")
    if text.format:
        refuse_unknown(text.format, "text.format")


def refuse_unknown(part: Body | None, path: str) -> None:
    """Raise InvalidField if an object of the body has a key that is not known."""
    for name in (part.model_extra or {}) if part else {}:
        raise InvalidField(f"{path}.{name[:60]}", "this field is not known; leave it out")


def chat_of(request: ResponsesRequest, num_dropped: int = 0) -> ResponsesChat:
    """Return the chat that a body asks for, without the first `num_dropped` items of its input.

    Raises
    ------
    InvalidRequest
        if an item, a tool or a value is wrong.
    """
    reader = InputReader()
    if request.instructions:
        reader.add({"role": "system", "content": request.instructions}, "instructions")
    if isinstance(request.input, str):
        reader.add({"role": "user", "content": request.input}, "input")
    else:
        reader.read(request.input, num_dropped)
    if not reader.messages:
        raise InvalidField("input", "must be a text that is not empty, or a list of items")
    values = dict(request.model_extra or {}) | {
        "model": request.model,
        "messages": reader.messages,
        "stream": request.stream,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logprobs": request.wants_logprobs or None,
        "top_logprobs": request.top_logprobs,
        "response_format": format_of(request.text),
        "tools": tools_of(request.tools),
        "tool_choice": tool_choice_of(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
    }
    names = RENAMED | reader.names | tool_names(request.tools)
    try:
        chat = read_chat({name: value for name, value in values.items() if value is not None})
    except InvalidField as error:
        raise renamed(error, names) from None
    return ResponsesChat(chat, names)


def format_of(text: TextOptions | None) -> dict[str, Any] | None:
    """Return `response_format` of a chat."""
    if text is None or text.format is None:
        return None
    given = text.format
    if given.type != "json_schema":
        return {"type": given.type}
    schema = {
        "name": given.name,
        "description": given.description,
        "schema": given.json_schema,
        "strict": given.strict,
    }
    known = {name: value for name, value in schema.items() if value is not None}
    return {"type": "json_schema", "json_schema": known}


def tools_of(tools: list[FunctionTool] | None) -> list[dict[str, Any]] | None:
    """Return `tools` of a chat."""
    if tools is None:
        return None
    for index, tool in enumerate(tools):
        if tool.type != "function":
            raise InvalidField(
                f"tools[{index}].type",
                f"{tool.type[:40]!r} is not supported; only tools of type function are",
            )
    return [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in tools
    ]


def tool_choice_of(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Return `tool_choice` of a chat."""
    match choice:
        case {"type": "function", "name": str(name), **rest} if not rest:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "tools": [*tools], **rest}:
            functions = [
                {"type": "function", "function": {"name": tool.get("name")}}
                if isinstance(tool, dict)
                else tool
                for tool in tools
            ]
            return {"type": "allowed_tools", "allowed_tools": rest | {"tools": functions}}
    return choice


def tool_names(tools: list[FunctionTool] | None) -> dict[str, str]:
    return {f"tools[{index}].function": f"tools[{index}]" for index in range(len(tools or []))}


def renamed(error: InvalidField, names: Mapping[str, str]) -> InvalidRequest:
    """Return the error with the name that the client knows in place of the chat's.

    `names` maps the beginnings of paths; the longest that fits counts.
    """
    path = error.param
    fitting = [name for name in names if path == name or path.startswith((f"{name}.", f"{name}["))]
    if not fitting:
        return error
    longest = max(fitting, key=len)
    problem = error.message.removeprefix(f"{path}: ")
    return InvalidField(names[longest] + path.removeprefix(longest), problem)
