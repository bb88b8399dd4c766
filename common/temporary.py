"""A folder for what processes on this host exchange: sockets, and the meeting place of ranks."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.config import BadSetting


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder with a name that nobody can guess, which only its owner may enter.

    It is removed when the block is left.

    Raises
    ------
    BadSetting
        if the folder cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as e:
        raise BadSetting(
            f"no temporary folder can be made ({e.strerror or e}): set TMPDIR to a folder that "
            "exists and can be written to"
        ) from e
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
