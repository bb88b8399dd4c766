"""Reads the files of a model directory. They come from elsewhere, and may be made to do harm.

A text file is read only if it is a regular file of bounded size in the directory, or in the cache
of a hub that the directory is part of: what it holds may end in prompts, which clients can read.
Weights may be links to anywhere.
"""

import json
import stat
from pathlib import Path
from typing import Any

from common.families.family import BadCheckpoint

MAX_JSON_BYTES = 64 * 2**20
"""No JSON file of a checkpoint is larger. The index of 100,000 tensors has about 10 MB."""
MAX_JSON_VALUES = 4 * 2**20
"""No JSON file has more values. A vocabulary of 256,000 tokens with its merges has 2 million."""
MAX_SHOWN_CHARS = 80


def read_file(file: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole file.

    Raises
    ------
    BadCheckpoint
        if it cannot be read, is not a regular file, or is larger than `max_bytes`.
    """
    try:
        # A pipe or a device would be read for ever.
        if not stat.S_ISREG(file.stat().st_mode):
            raise BadCheckpoint(f"{file} is not a regular file")
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
    except OSError as e:
        raise BadCheckpoint(f"{file} cannot be read: {e.strerror}") from e
    if len(data) > max_bytes:
        raise BadCheckpoint(f"{file} is larger than {max_bytes >> 20} MiB")
    return data


def check_place(model: Path, file: Path) -> None:
    """Check that a text file of a model directory does not lead out of it.

    The files in a directory of the Hugging Face cache (`snapshots/REVISION`) are links to files of
    the same repository in the cache.

    Raises
    ------
    BadCheckpoint
        if it is a link to somewhere else.
    """
    if not file.is_symlink():
        return
    folder = model.resolve()
    root = folder.parents[1] if folder.parent.name == "snapshots" else folder
    if not file.resolve().is_relative_to(root):
        raise BadCheckpoint(
            f"{file} is a link to a file outside of {root}: if you trust that file, copy it there "
            "(weights may be links)"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object. Raises BadCheckpoint if it is missing or not one."""
    return parse_json(read_file(file), str(file))


def read_optional_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Return an empty one if the file does not exist."""
    return read_json(file) if file.exists() else {}


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in UTF-8 that a file, or a part of one, holds.

    Raises
    ------
    BadCheckpoint
        if it is something else; `name` is what the error calls it.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_JSON_VALUES:
        raise BadCheckpoint(f"{name} has more than {MAX_JSON_VALUES} values")
    try:
        found = json.loads(data.decode(), parse_constant=refuse_constant)
    except RecursionError as e:
        raise BadCheckpoint(f"{name} is nested too deeply") from e
    except ValueError as e:
        raise BadCheckpoint(f"{name} is not valid JSON: {e}") from e
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{name} does not hold a JSON object")
    return found


def refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def shown(value: object) -> str:
    """Return a value of a checkpoint as an error shows it."""
    return repr(value)[:MAX_SHOWN_CHARS]
