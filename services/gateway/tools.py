"""Tools that the model may call: how a request describes them, and the calls of an answer."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.invalid_field import InvalidField
from services.gateway.limits import MAX_GUIDE_BYTES

MAX_TOOLS = 128
"""The most tools of a request, as in OpenAI's API."""
CHOICE_FORMS = (
    'use "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


class Closed(BaseModel):
    """A JSON object that has no other fields than those declared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Function(Closed):
    """What a tool is called, does and takes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; None for none."""
    strict: bool | None = None
    """Whether calls follow the schema also if the model decides whether to call."""


class Tool(Closed):
    """A tool in the form that OpenAI's clients send."""

    type: Literal["function"]
    function: Function
    cache_control: Any = None
    """A hint for other servers, which asks for nothing here."""

    def shown(self) -> dict[str, Any]:
        """Return what the chat template sees of the tool."""
        return self.model_dump(exclude={"cache_control"}, exclude_none=True)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What follows from the tools of a request."""

    tools: Sequence[dict[str, Any]] = ()
    """The tools that the model is shown, in OpenAI's form."""
    guide: Mapping[str, Any] = field(default_factory=dict)
    """The guide of kind `tool_calls` that the answer follows; empty for none."""
    is_named: bool = False
    """Whether the client named the one tool that the answer calls."""

    def guide_with(self, kind: str, text: str) -> tuple[str, str]:
        """Return the kind and the text of the guide of a request that asks for this one, too.

        An answer that may call tools follows it unless it calls one. A call that is required
        follows the tool only.
        """
        if not self.guide:
            return kind, text
        is_free = kind and not self.guide["required"]
        other = {"otherwise": {"kind": kind, "text": text}} if is_free else {}
        return "tool_calls", json.dumps({**self.guide, **other})


NO_TOOLS = ToolUse()


def read_tool_use(tools: Sequence[Tool], choice: Any, parallel: bool | None) -> ToolUse:
    """Return what `tools`, `tool_choice` and `parallel_tool_calls` of a request ask for.

    If no tool may be called, the model is shown none, and the answer is plain text.

    Raises
    ------
    InvalidField
        if they do not fit together.
    """
    if not tools and choice is None:
        return NO_TOOLS  # most requests
    check_tools(tools)
    mode, names = read_choice(choice, [tool.function.name for tool in tools])
    if mode == "none" or not tools:
        return NO_TOOLS
    chosen = [tool for tool in tools if tool.function.name in names]
    guide = {
        "functions": [
            {
                "name": tool.function.name,
                "parameters": tool.function.parameters,
                "strict": bool(tool.function.strict),
            }
            for tool in chosen
        ],
        "parallel": parallel is not False and mode != "named",
        "required": mode != "auto",
    }
    shown = [tool.shown() for tool in chosen]
    return ToolUse(shown, guide, is_named=mode == "named")


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise InvalidField if two tools have one name, or parameters are not those of an object."""
    names: set[str] = set()
    for n, tool in enumerate(tools):
        path = f"tools[{n}].function"
        name = tool.function.name
        if name in names:
            raise InvalidField(f"{path}.name", f"{name!r} is the name of two tools; rename one")
        names.add(name)
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            raise InvalidField(f"{path}.parameters.type", 'must be "object"')
    num_bytes = len(json.dumps([tool.shown() for tool in tools]))
    if num_bytes > MAX_GUIDE_BYTES:
        problem = f"{num_bytes} bytes are more than {MAX_GUIDE_BYTES}; send fewer tools"
        raise InvalidField("tools", problem)


def read_choice(choice: Any, names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return none, auto, required or named, and the names of the tools that may be called.

    `names` are those of all tools.
    """
    match choice:
        case None | "auto":
            return "auto", names
        case "none":
            return "none", ()
        case "required":
            if not names:
                raise InvalidField("tool_choice", '"required" needs tools; send at least one')
            return "required", names
        case {"type": "function", **rest}:
            return "named", [read_name(rest, names, "tool_choice")]
        case {"type": "allowed_tools", "allowed_tools": dict(allowed), **rest}:
            refuse_others(rest, (), "tool_choice")
            return read_allowed(allowed, names, "tool_choice.allowed_tools")
    raise InvalidField("tool_choice", f"this is not supported; {CHOICE_FORMS}")


def read_allowed(
    allowed: dict[str, Any], names: Sequence[str], path: str
) -> tuple[str, Sequence[str]]:
    """Return the mode, and the names of the tools that may be called."""
    refuse_others(allowed, ("mode", "tools"), path)
    mode = allowed.get("mode")
    if mode not in ("auto", "required"):
        raise InvalidField(f"{path}.mode", 'must be "auto" or "required"')
    found = allowed.get("tools")
    if not isinstance(found, list) or not found:
        raise InvalidField(f"{path}.tools", "must be a list of at least one tool")
    return mode, [
        read_allowed_name(one, names, f"{path}.tools[{n}]") for n, one in enumerate(found)
    ]


def read_allowed_name(tool: Any, names: Sequence[str], path: str) -> str:
    match tool:
        case {"type": "function", **rest}:
            return read_name(rest, names, path)
    raise InvalidField(path, 'must be {"type": "function", "function": {"name": ...}}')


def read_name(choice: Mapping[Any, Any], names: Sequence[str], path: str) -> str:
    """Return the name in `{"function": {"name": ...}}`, which must be one of `names`."""
    refuse_others(choice, ("function",), path)
    match choice:
        case {"function": {"name": str(name), **rest}}:
            refuse_others(rest, (), f"{path}.function")
            if name in names:
                return name
            problem = f"{name[:128]!r} is not among the tools; name one of them"
            raise InvalidField(f"{path}.function.name", problem)
    raise InvalidField(f"{path}.function.name", "must be the name of one of the tools")


def refuse_others(given: Mapping[Any, Any], known: Sequence[str], path: str) -> None:
    """Raise InvalidField if an object has a field that is not known."""
    for name in given:
        if name not in known:
            raise InvalidField(f"{path}.{name}", "there is no such field; leave it out")


@dataclass(slots=True)
class Call:
    """A call of an answer."""

    id: str
    name: str
    arguments: str
    """The JSON that the model wrote. It is cut off if the answer is."""


def join_calls(parts: Iterable[dict[str, Any]]) -> list[Call]:
    """Return the calls that the parts of an answer make, without those that were withdrawn."""
    calls: dict[int, Call] = {}
    for part in parts:
        index = part["index"]
        call = calls.setdefault(index, Call(part.get("id", ""), part.get("name", ""), ""))
        call.arguments += part["arguments"]
        if part.get("withdrawn"):
            del calls[index]
    return list(calls.values())
