"""The folder of one `twinlens serve`, which holds the sockets of its processes.

Only its owner may enter it. A launcher that was killed leaves its folder behind; the next one
removes it. It knows it by a file that a living launcher keeps locked.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.config import BadSetting
from common.logs import get_logger
from common.setting_checks import MAX_SOCKET_PATH_BYTES
from common.temporary import temporary_folder

PREFIX = "twinlens-"
LOCK = "launcher.lock"
LONGEST_NAME = "detokenizer-255.1023.sock"
"""No socket of `services/launcher/replicas.py` has a longer name."""


@contextlib.contextmanager
def open_run_dir() -> Iterator[Path]:
    """Make the folder, and remove it when the block is left.

    Raises
    ------
    BadSetting
        if the folder cannot be made, or its path is too long for sockets.
    """
    with temporary_folder(PREFIX) as run_dir:
        remove_abandoned(run_dir.parent)
        check_length(run_dir)
        with lock(run_dir):
            yield run_dir


def check_length(run_dir: Path) -> None:
    """Raise BadSetting if a socket in the folder would have too long a path."""
    if len(os.fsencode(run_dir / LONGEST_NAME)) > MAX_SOCKET_PATH_BYTES:
        raise BadSetting(
            f"the temporary folder {run_dir.parent} has too long a path for sockets: set TMPDIR to "
            f"one of at most {MAX_SOCKET_PATH_BYTES - len(LONGEST_NAME) - 20} bytes"
        )


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keep the folder's file locked. It gets its name only when it is, so no other launcher takes
    this folder for an abandoned one."""
    nameless = run_dir / f"{LOCK}.new"
    with nameless.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        nameless.rename(run_dir / LOCK)
        yield


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user's launchers that no longer run."""
    for file in parent.glob(f"{PREFIX}*/{LOCK}"):
        # A folder of another user, or one that disappears meanwhile, is left alone.
        with contextlib.suppress(OSError):
            if file.parent.lstat().st_uid == os.getuid() and is_abandoned(file):
                shutil.rmtree(file.parent, ignore_errors=True)
                get_logger().info("removed the folder of a killed launcher", folder=file.parent)


def is_abandoned(file: Path) -> bool:
    """Whether no process keeps the file locked."""
    descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
