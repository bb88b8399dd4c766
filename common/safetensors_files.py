"""Reads the table of contents of a safetensors file. The file may be made to do harm."""

from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from common.families.family import BadCheckpoint
from common.model_files import MAX_SHOWN_CHARS, parse_json
from common.tensor_info import (
    ITEM_BITS,
    MAX_DIMENSIONS,
    MAX_NAME_CHARS,
    MAX_TENSORS,
    TensorInfo,
)

MAX_HEADER_BYTES = 100 * 2**20


def read_table(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by their names.

    The file begins with the length of the table in 8 bytes, and the table itself in JSON
    (https://huggingface.co/docs/safetensors).

    Raises
    ------
    BadCheckpoint
        if it is not such a file, or is damaged.
    """
    with file.open("rb") as f:
        return parse_table(file, f, file.stat().st_size)


def parse_table(file: Path, f: BinaryIO, size: int) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file of `size` bytes, as `read_table` does.

    `f` is the file, or what was read of it; errors call it `file`.
    """
    length = int.from_bytes(f.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise BadCheckpoint(f"{file} is not a safetensors file, or is cut off: download it again")
    table = f.read(length)
    try:
        header = parse_json(table, "its table of contents")
    except BadCheckpoint as e:
        raise BadCheckpoint(f"{file} is not a safetensors file: {e}") from e
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise BadCheckpoint(f"{file} has more than {MAX_TENSORS} tensors")
    return {name: read_entry(file, name, entry, 8 + length, size) for name, entry in header.items()}


def read_entry(file: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    """Return one tensor of a file of `size` bytes. The file's data begins at byte `start`."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end
            and all(type(n) is int and 0 <= n <= size for n in shape)
            and len(shape) <= MAX_DIMENSIONS
            and len(name) <= MAX_NAME_CHARS
        ):
            pass
        case _:
            raise BadCheckpoint(
                f"{file} is not a safetensors file: its entry of {name[:MAX_SHOWN_CHARS]} is "
                "malformed"
            )
    if dtype in ITEM_BITS and prod(shape) * ITEM_BITS[dtype] != 8 * (end - begin):
        raise BadCheckpoint(
            f"{file} is damaged: {name[:MAX_SHOWN_CHARS]} has {end - begin} bytes, which is not "
            f"{shape} of {dtype}; download it again"
        )
    if start + end > size:
        raise BadCheckpoint(f"{file} is cut off at {size} bytes: download it again")
    return TensorInfo(file, dtype, tuple(shape), end - begin, start + begin)
