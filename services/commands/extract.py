"""`twinlens extract-embeddings`: writes the token embeddings of a model as a file of their own."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.config import BadSetting, check_values
from common.embedding_table import NAMES
from common.process import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from common.settings import ExtractSettings
from common.tensor_info import TensorInfo

PIECE_BYTES = 16 * 2**20
"""What is held of the embeddings at a time."""
ITEMS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def extract(settings: ExtractSettings) -> int:
    """Write the file, and return the exit status."""
    try:
        check_values(settings)
        checkpoint = open_checkpoint(settings.model)
        folder = Path(settings.out).expanduser() if settings.out else checkpoint.path
        file = write_table(checkpoint, folder)
    except (BadCheckpoint, BadSetting) as e:
        print(f"twinlens extract-embeddings: {e}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as e:
        advice = "" if settings.out else "; set another folder with --out"
        print(f"twinlens extract-embeddings: {e.filename}: {e.strerror}{advice}", file=sys.stderr)
        return EXIT_FAILED
    rows, width = checkpoint.embedding_table[1]
    print(f"{file}: float16 [{rows}, {width}]")
    return EXIT_OK


def write_table(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the embeddings to a file in `folder`, which appears when it is whole.

    Raises
    ------
    BadCheckpoint
        if the model has no embeddings, or they do not fit into float16.
    OSError
        if the file cannot be written.
    """
    name, shape = checkpoint.embedding_table
    info = checkpoint.stored_tensors.get(name)
    if info is None or len(shape) != 2 or info.dtype not in ITEMS:
        raise BadCheckpoint(f"{checkpoint.path} has no token embeddings {name} that can be written")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAMES[0]
    unfinished = folder / f".{file.name}-{os.getpid()}"
    try:
        with unfinished.open("wb") as f:
            for values in pieces(info):
                half = to_float16(values)
                if not np.isfinite(half).all():
                    raise BadCheckpoint(f"{info.file}: {name} has values that float16 cannot hold")
                f.write(half.tobytes())
            f.flush()
            os.fsync(f.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def pieces(info: TensorInfo) -> Iterator[np.ndarray]:
    """Yield the elements of a tensor in order, as they are stored."""
    item = np.dtype(ITEMS[info.dtype])
    left = info.num_bytes
    with info.file.open("rb") as f:
        f.seek(info.offset)
        while left:
            data = f.read(min(left, PIECE_BYTES))
            if not data:
                raise BadCheckpoint(f"{info.file} is cut off: download it again")
            left -= len(data)
            yield np.frombuffer(data, item)


def to_float16(values: np.ndarray) -> np.ndarray:
    """Round elements to float16. Those of bfloat16 are the upper halves of float32."""
    if values.dtype == np.uint16:
        values = (values.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):
        return values.astype("<f2")
