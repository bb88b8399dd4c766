"""Readers of the published data files, which say in one line where a file is wrong.

Rows that hold images are read without them. An image is read again when it is sent.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.commands.client import ClientError
from services.commands.evaluation.task import ReadImage


class BadData(ClientError):
    """A data file is not what was expected; the message names the file, the line and what was."""


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or raise BadData."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadData(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{path}: expected text in UTF-8") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or raise BadData."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise BadData(f"{path}, line {error.lineno}: expected JSON ({error.msg})") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (file and line) and the object of each line that is not empty."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadData(f"{place}: expected one JSON object ({error.msg})") from error
        if not isinstance(value, dict):
            raise BadData(f"{place}: expected one JSON object")
        yield place, value


def take(row: Any, name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """Return a field of an object, or raise BadData if it is absent or of another type."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        names = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(JSON_NAMES[each] for each in names)
        raise BadData(f'{place}: expected "{name}", {wanted}')
    return value


JSON_NAMES = {
    str: "a string",
    bytes: "bytes",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def image_file(path: Path, place: str) -> ReadImage:
    """Return a reader of an image file, which must exist."""
    if not path.is_file():
        raise BadData(f"{place}: expected an image file at {path}")
    return path.read_bytes


def decode_image(text: str, place: str) -> bytes:
    """Return the bytes of an image in base64, with or without the head of a data: URI."""
    try:
        return base64.b64decode(text.removeprefix("data:").rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadData(f"{place}: expected an image in base64") from error
