"""The items of a response's input as messages of a chat."""

from typing import Any

from services.gateway.invalid_field import InvalidField

HARMLESS = {"id", "status", "phase", "type"}
"""Keys of items that ask for nothing. An answer's items have them, and clients send those back."""
KNOWN = {
    "message": {"role", "content"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
}
PART_KEYS = {
    "input_text": {"text"},
    "output_text": {"text", "annotations", "logprobs"},
    "refusal": {"refusal"},
    "input_image": {"image_url", "detail"},
}
NEUTRAL_PART_KEYS = {"type", "cache_control", "uuid", "prompt_cache_breakpoint"}


class InputReader:
    """Collects the messages of a chat.

    `names` has the path in the body of each message. A call of a tool belongs to the message of the
    assistant before it.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}

    def add(self, message: dict[str, Any], path: str) -> None:
        """Add a message that comes from this path of the body."""
        prefix = f"messages[{len(self.messages)}]"
        self.names[prefix] = path
        if not isinstance(message.get("content"), list):
            self.names[f"{prefix}.content"] = f"{path}.content" if "[" in path else path
        self.messages.append(message)

    def read(self, items: list[dict[str, Any]], num_dropped: int) -> None:
        """Read all items but the first ones that truncation may drop.

        Instructions (roles system and developer) are never dropped. The output of a call that was
        dropped is, too.

        Raises
        ------
        InvalidField
            if an item is wrong.
        """
        called: set[str] = set()
        for index, item in enumerate(items):
            path = f"input[{index}]"
            kind = kind_of(item, path)
            if index < num_dropped and item.get("role") not in ("system", "developer"):
                continue
            match kind:
                case "message":
                    self._read_message(item, path)
                case "function_call":
                    called.add(str(item.get("call_id")))
                    self._read_call(item, path)
                case _:
                    if not num_dropped or str(item.get("call_id")) in called:
                        self._read_output(item, path)

    def _read_message(self, item: dict[str, Any], path: str) -> None:
        role = item.get("role")
        if not isinstance(role, str):
            raise InvalidField(f"{path}.role", "must be a string, such as user")
        content = item.get("content")
        if isinstance(content, list):
            content = read_parts(content, f"{path}.content")
        elif not isinstance(content, str):
            raise InvalidField(f"{path}.content", "must be a string or a list of parts")
        self.add({"role": role, "content": content}, path)

    def _read_call(self, item: dict[str, Any], path: str) -> None:
        call = {
            "id": text_in(item, "call_id", path),
            "type": "function",
            "function": {
                "name": text_in(item, "name", path),
                "arguments": text_in(item, "arguments", path),
            },
        }
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant":
            self.add({"role": "assistant", "content": None, "tool_calls": []}, path)
            last = self.messages[-1]
        calls = last.setdefault("tool_calls", [])
        place = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self.names[place] = path
        self.names[f"{place}.function"] = path
        calls.append(call)

    def _read_output(self, item: dict[str, Any], path: str) -> None:
        output = item.get("output")
        if isinstance(output, list):
            output = read_parts(output, f"{path}.output")
        elif not isinstance(output, str):
            raise InvalidField(f"{path}.output", "must be a string or a list of parts")
        message = {
            "role": "tool",
            "tool_call_id": text_in(item, "call_id", path),
            "content": output,
        }
        self.add(message, path)
        prefix = f"messages[{len(self.messages) - 1}]"
        self.names[f"{prefix}.content"] = f"{path}.output"
        self.names[f"{prefix}.tool_call_id"] = f"{path}.call_id"


def kind_of(item: dict[str, Any], path: str) -> str:
    """Return the type of an item, which is a message if it does not say.

    Raises InvalidField if it is not supported, or has keys that are not known.
    """
    kind = item.get("type") or "message"
    if kind == "item_reference":
        raise InvalidField(f"{path}.type", "responses are not stored here; send the item itself")
    if kind not in KNOWN:
        known = ", ".join(KNOWN)
        raise InvalidField(f"{path}.type", f"{str(kind)[:40]!r} is not supported; send {known}")
    refuse_unknown_keys(item, KNOWN[kind] | HARMLESS, path)
    return kind


def read_parts(parts: list[Any], path: str) -> list[dict[str, Any]]:
    """Return the parts of a message of a response as those of a chat."""
    return [read_part(part, f"{path}[{index}]") for index, part in enumerate(parts)]


def read_part(part: Any, path: str) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
        raise InvalidField(path, "must be an object with a type, such as input_text")
    if kind not in PART_KEYS:
        known = ", ".join(PART_KEYS)
        raise InvalidField(f"{path}.type", f"{kind[:40]!r} is not supported; send {known}")
    if part.get("file_id") is not None:
        raise InvalidField(f"{path}.file_id", "files are not stored here; send image_url")
    refuse_unknown_keys(part, PART_KEYS[kind] | NEUTRAL_PART_KEYS | {"file_id"}, path)
    match kind:
        case "input_image":
            image = {"url": text_in(part, "image_url", path)}
            if part.get("detail") is not None:
                image["detail"] = part["detail"]
            return {"type": "image_url", "image_url": image}
        case "refusal":
            return {"type": "refusal", "refusal": text_in(part, "refusal", path)}
    return {"type": "text", "text": text_in(part, "text", path)}


def refuse_unknown_keys(given: dict[str, Any], known: set[str], path: str) -> None:
    for name in given:
        if name not in known and given[name] is not None:
            raise InvalidField(f"{path}.{name[:60]}", "this field is not known; leave it out")


def text_in(given: dict[str, Any], name: str, path: str) -> str:
    if not isinstance(text := given.get(name), str):
        raise InvalidField(f"{path}.{name}", "must be a string")
    return text
