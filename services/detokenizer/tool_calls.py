"""Takes tool calls out of the text of an answer while it comes.

A call has the form that Hermes and Qwen models are trained to write:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict, TypeVar

import msgspec

from common.tool_calls import CLOSE, OPEN
from services.detokenizer.incremental import num_held

SPACE = " \t\r\n"
"""The white space of JSON."""
OUTSIDE_STRINGS = frozenset('{}[]:,"+-.0123456789eEtrufalsn' + SPACE)
"""The characters of JSON outside its strings."""
MAX_HEAD_CHARS = 600
"""The most characters of a call that are searched for where its arguments begin."""
HEAD = re.compile(
    r'[ \t\r\n]{0,16}\{[ \t\r\n]{0,16}"name"[ \t\r\n]{0,16}:[ \t\r\n]{0,16}'
    r'("(?:[^"\\\x00-\x1f]|\\.){1,256}")'
    r'[ \t\r\n]{0,16},[ \t\r\n]{0,16}"arguments"[ \t\r\n]{0,16}:[ \t\r\n]{0,16}(?=\{)'
)
"""A call up to where its arguments begin, if its name comes first."""

T = TypeVar("T")


class Part(TypedDict):
    """What became certain of a call."""

    index: int
    """Which call of the answer it belongs to."""
    arguments: str
    """More of the JSON of the arguments, as the model wrote it."""
    id: NotRequired[str]
    """With the first part of a call."""
    name: NotRequired[str]
    """With the first part of a call."""
    withdrawn: NotRequired[bool]
    """Whether the call has turned out to be malformed. Then its text follows whole."""
    text: NotRequired[str]
    """Text of the answer that follows the part."""


class Call(msgspec.Struct):
    """A call as the model writes it."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


@dataclass(slots=True)
class JsonScanner:
    """Finds the end of a JSON object in a text that comes in pieces.

    It knows strings and brackets only, so what it finds may still be malformed.
    """

    depth: int = 0
    is_in_string: bool = False
    is_escaped: bool = False
    is_wrong: bool = False
    """Whether the text cannot be JSON."""

    def read(self, text: str) -> int | None:
        """Return where the object ends, or the first character that cannot be JSON; None if the
        text goes on."""
        for at, character in enumerate(text):
            if self.is_in_string:
                self._read_in_string(character)
            elif character == '"' and self.depth:
                self.is_in_string = True
            elif character == "{" or (character == "[" and self.depth):
                self.depth += 1
            elif character in "}]" and self.depth:
                self.depth -= 1
                if not self.depth:
                    return at + 1
            else:
                self.is_wrong = character not in (OUTSIDE_STRINGS if self.depth else SPACE)
            if self.is_wrong:
                return at
        return None

    def _read_in_string(self, character: str) -> None:
        if character < " ":
            self.is_wrong = True
        elif self.is_escaped:
            self.is_escaped = False
        elif character == "\\":
            self.is_escaped = True
        elif character == '"':
            self.is_in_string = False


@dataclass(slots=True)
class Parsed:
    """What became certain of an answer."""

    text: str = ""
    """The text before the calls."""
    parts: list[Part] = field(default_factory=list)
    """At most one of each call."""

    def add_text(self, text: str) -> None:
        """Add text that follows what is there."""
        if text and self.parts:
            self.parts[-1]["text"] = self.parts[-1].get("text", "") + text
        else:
            self.text += text


class ToolCallParser:
    """Separates the text of one answer from its calls.

    What `push` and `finish` return depends on the text so far, and not on its pieces. So an answer
    that is resumed goes on where it was. Calls are delivered while they come, except those that do
    not begin with their name. What is not a call stays in the text, except white space next to a
    call.
    """

    def __init__(self, request_id: str) -> None:
        """Begin an answer. `request_id` makes the ids of its calls unique."""
        self.num_complete = 0
        """The number of calls that are complete."""
        self._request_id = request_id
        self._num_begun = 0
        self._has_text = False
        """Whether anything but white space came since the last call."""
        self._rest = ""
        """Text that is not certain yet."""
        self._parsed = Parsed()
        self._read: Callable[[], bool] = self._read_text
        self._raw = ""
        """The text of the call in progress before `_rest`."""
        self._num_scanned = 0
        """How much of `_rest` the scanner has read."""
        self._scanner = JsonScanner()
        self._arguments = ""

    def push(self, text: str) -> Parsed:
        """Return what has become certain with more text."""
        self._rest += text
        self._parsed = Parsed()
        while self._read():
            pass
        return self._parsed

    def finish(self) -> str:
        """Return the text that was held back, at the end of the answer.

        A call whose arguments have begun stays what it is, even if it is cut off.
        """
        if self._read == self._read_text:
            is_dropped = self._num_begun and not self._rest.strip(SPACE)
            return "" if is_dropped else self._rest
        return self._raw + self._rest if self._read == self._read_head else ""

    # Each of these methods reads from `_rest`. It returns whether another one can go on.

    def _read_text(self) -> bool:
        start = self._rest.find(OPEN)
        is_found = start >= 0
        end = start if is_found else len(self._rest) - num_held(self._rest, OPEN)
        self._has_text |= bool(self._rest[:end].strip(SPACE))
        if self._has_text:
            self._parsed.add_text(self._take(end))
            end = 0
        if is_found:
            self._raw = self._take(end + len(OPEN))
            self._scan_next(self._read_head)
        return is_found

    def _read_head(self) -> bool:
        """Read up to the arguments, or a whole call that does not begin with its name."""
        is_short = self._num_scanned < MAX_HEAD_CHARS
        if is_short and (match := HEAD.match(self._rest[:MAX_HEAD_CHARS])):
            return self._read_name(match)
        end = self._scanner.read(self._rest[self._num_scanned :])
        if end is None:
            self._num_scanned = len(self._rest)
            return False
        end += self._num_scanned
        call = None if self._scanner.is_wrong else decode(self._rest[:end], Call)
        if call is None or not (arguments := bytes(call.arguments).decode()).startswith("{"):
            return self._withdraw(end)
        self._begin(call.name)
        self._part()["arguments"] = arguments
        self._take(end)
        return self._complete()

    def _read_name(self, match: re.Match[str]) -> bool:
        name = decode(match[1], str)
        if name is None:
            return self._withdraw(match.end())
        self._begin(name)
        self._raw += self._take(match.end())
        self._scan_next(self._read_arguments)
        return True

    def _read_arguments(self) -> bool:
        end = self._scanner.read(self._rest)
        arguments = self._take(end)
        self._raw += arguments
        self._arguments += arguments
        self._part()["arguments"] += arguments
        if end is None:
            return False
        if self._scanner.is_wrong or decode(self._arguments, dict) is None:
            return self._withdraw(0)
        self._read = self._read_end
        return True

    def _read_end(self) -> bool:
        stripped = self._rest.lstrip(SPACE)
        if not stripped:
            return False
        if not stripped.startswith("}"):
            return self._withdraw(0)
        self._rest = stripped[1:]
        return self._complete()

    def _read_close(self) -> bool:
        """Read the mark behind a call, which may be missing."""
        self._rest = self._rest.lstrip(SPACE)
        if len(self._rest) < len(CLOSE) and CLOSE.startswith(self._rest):
            return False
        self._rest = self._rest.removeprefix(CLOSE)
        self._read = self._read_text
        return True

    def _take(self, end: int | None) -> str:
        """Remove the beginning of `_rest`, or all of it, and return it."""
        taken = self._rest[:end]
        self._rest = self._rest[len(taken) :]
        return taken

    def _scan_next(self, read: Callable[[], bool]) -> None:
        """Go on with a method that reads a JSON object."""
        self._scanner = JsonScanner()
        self._num_scanned = 0
        self._arguments = ""
        self._read = read

    def _begin(self, name: str) -> None:
        index = self._num_begun
        self._num_begun += 1
        part = self._part()
        part["id"] = call_id(self._request_id, index)
        part["name"] = name

    def _part(self) -> Part:
        """Return the part of the call in progress that is delivered next."""
        index = self._num_begun - 1
        parts = self._parsed.parts
        if not parts or parts[-1]["index"] != index:
            parts.append({"index": index, "arguments": ""})
        return parts[-1]

    def _complete(self) -> bool:
        self.num_complete += 1
        self._has_text = False
        self._read = self._read_close
        return True

    def _withdraw(self, end: int) -> bool:
        """Return a malformed call to the text, up to `end` in `_rest`."""
        if self._read in (self._read_arguments, self._read_end):
            self._part()["withdrawn"] = True
        self._parsed.add_text(self._raw + self._take(end))
        self._has_text = True
        self._read = self._read_text
        return True


def decode(text: str, kind: type[T]) -> T | None:
    """Return JSON as a value of this kind, or None if it is not one."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return None


def call_id(request_id: str, index: int) -> str:
    """Return the id of a call, which is the same after the answer was resumed."""
    return "call_" + hashlib.sha256(f"{request_id}/{index}".encode()).hexdigest()[:24]
