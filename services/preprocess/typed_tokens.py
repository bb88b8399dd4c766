"""Keeps users from writing control tokens.

A chat template makes a prompt of its own words and of what users wrote, and its text does not tell
these apart. So each character of users' texts that could begin the name of a token is followed by
a *mark*, a character that no text of the request has. No name stands in a marked text then, not
even across two texts. Once the prompt is tokenized the marks are removed.

A template sees users' texts without marks, so it can compare, split and measure them. The marks
come in when it writes them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MARKS = [chr(code) for code in range(0xE000, 0xE100)]
"""Characters of private use, which have no meaning in Unicode."""
METHODS = (
    *("capitalize", "casefold", "center", "expandtabs", "join", "ljust", "lower", "lstrip"),
    *("partition", "removeprefix", "removesuffix", "replace", "rjust", "rpartition", "rsplit"),
    *("rstrip", "split", "splitlines", "strip", "swapcase", "title", "translate", "upper"),
    *("zfill", "__getitem__", "__mul__", "__rmul__"),
)
"""The methods of texts that return texts. The sandbox of templates has its own `format`."""


def unused_marks(values: Any) -> list[str]:
    """Return the marks that no text in these JSON values has."""
    used = set(json.dumps(values, ensure_ascii=False))
    return [mark for mark in MARKS if mark not in used]


def has_any(values: Any, characters: Iterable[str]) -> bool:
    """Whether a text in these JSON values has one of the characters."""
    used = set(json.dumps(values, ensure_ascii=False))
    return not used.isdisjoint(characters)


class UserText(str):
    """A text that a user wrote. It is marked once it is written, and so is what is made of it."""

    __slots__ = ()
    characters: str
    """Those that could begin a name."""
    mark: str
    """What follows each of them."""

    def __str__(self) -> str:
        text = str.__getitem__(self, slice(None))
        for character in self.characters:
            text = text.replace(character, character + self.mark)
        return text

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __add__(self, other: str) -> str:
        return str(self) + str(other)

    def __radd__(self, other: str) -> str:
        return str(other) + str(self)

    def __mod__(self, values: Any) -> str:
        return str(self) % values

    def __iter__(self) -> Iterator[str]:
        return map(type(self), str.__iter__(self))

    def encode(self, *arguments: Any, **named: Any) -> bytes:
        return str(self).encode(*arguments, **named)


def alike(kind: type[UserText], value: Any) -> Any:
    """Return what a method made of a user's text, as users' texts."""
    match value:
        case str():
            return kind(value)
        case list() | tuple():
            return type(value)(alike(kind, one) for one in value)
    return value


def method_of(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: UserText, *arguments: Any, **named: Any) -> Any:
        return alike(type(self), method(self, *arguments, **named))

    return call


for name in METHODS:
    setattr(UserText, name, method_of(name))


def as_user_text(value: Any, characters: str, mark: str) -> Any:
    """Return a JSON value whose texts and keys are users' texts, if they have a character that
    could begin a name."""
    fields = {"__slots__": (), "characters": characters, "mark": mark}
    kind = type("UserText", (UserText,), fields)

    def convert(value: Any) -> Any:
        match value:
            case str():
                return kind(value) if any(one in value for one in characters) else value
            case dict():
                return {convert(name): convert(one) for name, one in value.items()}
            case list():
                return [convert(one) for one in value]
        return value

    return convert(value)


def written(value: Any) -> Any:
    """Return a value with users' texts as they are written, marked."""
    match value:
        case UserText():
            return str(value)
        case dict():
            return {written(name): written(one) for name, one in value.items()}
        case list() | tuple():
            return [written(one) for one in value]
    return value
