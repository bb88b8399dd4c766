"""The place of a tensor in a file of weights, whatever the file's format."""

from dataclasses import dataclass
from pathlib import Path

MAX_TENSORS = 2**20
MAX_DIMENSIONS = 8
MAX_NAME_CHARS = 1024
ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""The size of an element by its type. Other types are not checked, and not loaded either."""


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in its file, its type and its shape. Its elements are in row order."""

    file: Path
    dtype: str
    """The name of the type in safetensors: BF16, F32, ..."""
    shape: tuple[int, ...]
    num_bytes: int
    offset: int
    """The position of its first byte in the file."""
