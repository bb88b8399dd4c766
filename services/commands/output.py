"""Text from a running system, made fit for a terminal.

An answer, or what a member says about itself, may contain sequences that a terminal obeys.
"""

import json
import math
import re
import sys
from typing import Any

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that change the direction of text or begin a line."""
CONTROLS_IN_TEXT = re.compile(rf"(?![\n\t]){CONTROLS.pattern}")


def one_line(text: str) -> str:
    """Return a text as one line, with its control characters escaped."""
    return CONTROLS.sub(escape, text)


def answer_text(text: str) -> str:
    """Return a part of an answer as stdout should get it.

    On a terminal, control characters other than line breaks and tabs are escaped. A file or another
    program gets the text as it is.
    """
    return CONTROLS_IN_TEXT.sub(escape, text) if sys.stdout.isatty() else text


def json_line(value: Any) -> str:
    """Return a value as JSON that contains no control characters.

    Numbers that JSON cannot write, such as NaN, become null.
    """
    return CONTROLS.sub(escape, json.dumps(finite(value), ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    """Return a JSON value with null in the place of numbers that are not finite."""
    match value:
        case dict():
            return {key: finite(entry) for key, entry in value.items()}
        case list() | tuple():
            return [finite(entry) for entry in value]
        case float() if not math.isfinite(value):
            return None
    return value


def escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
