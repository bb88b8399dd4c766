"""Keeps users from writing control tokens.

A chat template makes a prompt of its own words and of what users wrote, and its text does not tell
these apart. So each character of users' texts that could begin the name of a token is followed by
a *mark*, a character that no text of the request has. No name stands in a marked text then, not
even across two texts. Once the prompt is tokenized the marks are removed.
"""

import json
from collections.abc import Iterable
from typing import Any

MARKS = [chr(code) for code in range(0xE000, 0xE100)]
"""Characters of private use, which have no meaning in Unicode."""


def unused_marks(values: Any) -> list[str]:
    """Return the marks that no text in these JSON values has."""
    used = set(json.dumps(values, ensure_ascii=False))
    return [mark for mark in MARKS if mark not in used]


def has_any(values: Any, characters: Iterable[str]) -> bool:
    """Whether a text in these JSON values has one of the characters."""
    used = set(json.dumps(values, ensure_ascii=False))
    return not used.isdisjoint(characters)


def marked(value: Any, table: dict[int, str]) -> Any:
    """Return a JSON value whose texts and keys are translated by `table`."""
    match value:
        case str(text):
            return text.translate(table)
        case dict():
            return {marked(name, table): marked(one, table) for name, one in value.items()}
        case list():
            return [marked(one, table) for one in value]
    return value
