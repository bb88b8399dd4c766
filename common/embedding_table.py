"""The file of token embeddings that some servers read instead of the weights.

It holds float16 values, row after row of a matrix [vocab_size, hidden_size], and no header.
"""

from math import prod
from pathlib import Path

from common.families.family import BadCheckpoint
from common.tensor_info import TensorInfo

NAMES = ("embed_tokens.bin", "emb_tokens.bin")
"""What the file is called; the first name is the one that we give it."""
ITEM_BYTES = 2


def find_table(path: str) -> Path:
    """Return the file, which `path` names, or which is in the folder that it names.

    Raises
    ------
    BadCheckpoint
        if there is no such file.
    """
    given = Path(path).expanduser()
    files = [given / name for name in NAMES] if given.is_dir() else [given]
    for file in files:
        if file.is_file():
            return file
    raise BadCheckpoint(
        f"no embeddings at {given}: give the file that `twinlens extract-embeddings` writes, or a "
        f"folder with {' or '.join(NAMES)}"
    )


def table_info(file: Path, shape: tuple[int, ...]) -> TensorInfo:
    """Return the table as a tensor of this shape.

    Raises
    ------
    BadCheckpoint
        if the file has another size.
    """
    num_bytes = ITEM_BYTES * prod(shape)
    if file.stat().st_size != num_bytes:
        raise BadCheckpoint(
            f"{file} has {file.stat().st_size} bytes, but the model's embeddings of shape {shape} "
            f"in float16 have {num_bytes}: extract them again from this model"
        )
    return TensorInfo(file, "F16", shape, num_bytes, 0)
