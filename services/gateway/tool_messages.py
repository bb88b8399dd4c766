"""Messages about tools: the calls of an assistant, and what the tools answered."""

import json
from typing import Any, NoReturn

from common.errors import InvalidRequest
from services.gateway.invalid_field import InvalidField
from services.gateway.json_bounds import check_json
from services.gateway.tools import refuse_others

NEUTRAL_FIELDS = ("index", "cache_control")
"""Fields of a call that ask for nothing. Clients that join a stream send back the index."""


def read_tool_fields(role: str, tool_calls: Any, tool_call_id: Any, path: str) -> dict[str, Any]:
    """Return the fields about tools of a message, in the form that a chat template takes.

    `path` names the message in errors. Raises InvalidField if a field is malformed, or belongs to a
    message of another role.
    """
    if role == "tool":
        if not isinstance(tool_call_id, str) or not tool_call_id:
            raise InvalidField(f"{path}.tool_call_id", "must be the id of the call that it answers")
    elif tool_call_id is not None:
        raise InvalidField(f"{path}.tool_call_id", f"a message of role {role!r} has none")
    if not isinstance(tool_calls, list | None):
        raise InvalidField(f"{path}.tool_calls", "must be a list of calls")
    if tool_calls and role != "assistant":
        raise InvalidField(f"{path}.tool_calls", f"a message of role {role!r} has none")
    fields: dict[str, Any] = {"tool_call_id": tool_call_id} if role == "tool" else {}
    if tool_calls:
        fields["tool_calls"] = [
            read_tool_call(call, f"{path}.tool_calls[{n}]") for n, call in enumerate(tool_calls)
        ]
    return fields


def read_tool_call(call: Any, path: str) -> dict[str, Any]:
    """Return a call with its arguments as an object. Raises InvalidField if it is malformed."""
    match call:
        case {"id": str(id), "type": "function", "function": dict(function), **rest} if id:
            refuse_others(rest, NEUTRAL_FIELDS, path)
            return {"id": id, "type": "function", "function": read_function(function, path)}
        case {"type": str(kind)} if kind != "function":
            raise InvalidField(f"{path}.type", f'{kind[:40]!r} is not supported; use "function"')
    raise InvalidField(path, 'must be {"id": ..., "type": "function", "function": {...}}')


def read_function(function: dict[str, Any], path: str) -> dict[str, Any]:
    match function:
        case {"name": str(name), "arguments": str(arguments), **rest} if name:
            refuse_others(rest, (), f"{path}.function")
            arguments_path = f"{path}.function.arguments"
            return {"name": name, "arguments": read_arguments(arguments, arguments_path)}
    problem = "must have a name, and arguments, which are a string with JSON"
    raise InvalidField(f"{path}.function", problem)


def read_arguments(text: str, path: str) -> dict[str, Any]:
    """Return the arguments of a call. An empty text stands for none."""
    try:
        check_json(text.encode())
        arguments = json.loads(text or "{}", parse_constant=refuse_constant)
    except (ValueError, RecursionError) as e:
        raise InvalidField(path, f"this is not JSON: {e}") from None
    except InvalidRequest as e:
        raise InvalidField(path, e.message) from None
    if not isinstance(arguments, dict):
        raise InvalidField(path, "must be a JSON object")
    return arguments


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a value of JSON")
