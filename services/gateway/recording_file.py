"""The file of a recording: opened with care, bounded in size, and written by its own thread."""

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from common.config import BadSetting
from common.logs import get_logger
from common.recording import BadRecording, Record, Started, frame, frames_in

MAX_HELD_BYTES = 128 * 2**20
"""What may wait to be written. Beyond it the disk is too slow, and requests are not recorded."""
SHARE_OF_REQUESTS = 0.95
"""The part of the file that requests may fill. The rest is for the ends of those recorded."""
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Errors that end the recording and not the service, because they may come at any time."""
CLOSE_SECONDS = 2.0

Work = Callable[[], object]


def open_recording(path: Path) -> BinaryIO:
    """Open a new recording, or the one that is there to append to it. Others may not read it.

    A record at its end that was cut off is removed.

    Raises
    ------
    BadSetting
        if the file is something else, or belongs to a running gateway.
    OSError
        if it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.ExitStack() as on_error:
        file = on_error.enter_context(os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadSetting(f"--record: {path} is not a file: name a new one")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end = end_of_records(file)
        except BlockingIOError:
            problem = f"another gateway writes to {path}: give each its own file"
            raise BadSetting(f"--record: {problem}") from None
        except BadRecording as error:
            problem = f"{path} exists, and {error}. It is left as it is: name a new file"
            raise BadSetting(f"--record: {problem}") from None
        file.truncate(end)
        file.seek(end)
        on_error.pop_all()
    return file


def end_of_records(file: BinaryIO) -> int:
    """Return where the last whole record ends, or raise BadRecording."""
    end = 0
    for offset, length in frames_in(file):
        end = offset + length
    if end == 0 and os.fstat(file.fileno()).st_size > 0:
        raise BadRecording("it is not a recording")
    return end


class RecordingFile:
    """A recording that is being written, by one thread.

    The recording ends, with one line in the log, when it has its size or when the disk fails. What
    is left of the work is dropped then.
    """

    def __init__(self, file: BinaryIO, limit: int, model_name: str) -> None:
        """`limit` is in bytes. The file is closed with `close`."""
        self._file = file
        self._limit = limit
        self._size = os.fstat(file.fileno()).st_size
        self._log = get_logger()
        self._changed = threading.Condition()
        self._work: deque[tuple[Work, int]] = deque()
        self._held_bytes = 0
        self._num_dropped = 0
        self._is_closing = False
        self.is_full = False
        """Whether no request is recorded any more."""
        self._has_failed = False
        self.write(Started(twinlens=version("twinlens"), model=model_name, time=time.time()))
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    # Called by the event loop

    def submit(self, work: Work, num_bytes: int) -> bool:
        """Let the thread do this, unless too much waits already. Return whether it will.

        `num_bytes` is the memory that the work holds.
        """
        with self._changed:
            fits = self._held_bytes + num_bytes <= MAX_HELD_BYTES
            if fits:
                self._work.append((work, num_bytes))
                self._held_bytes += num_bytes
                self._changed.notify()
            else:
                self._num_dropped += 1
        return fits

    def close(self) -> None:
        """Write what waits, within two seconds, and close the file."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)

    # Called by the thread

    def has_room(self, num_bytes: int) -> bool:
        """Whether a request of this size may be written. The first that may not ends that."""
        if not self.is_full and self._size + num_bytes > SHARE_OF_REQUESTS * self._limit:
            self.is_full = True
            self._log.warning(
                "the recording has its size: no further requests are recorded",
                mib=self._limit >> 20,
            )
        return not self.is_full

    def write(self, record: Record) -> None:
        """Append a record, unless the file is full or has failed."""
        parts = frame(record)
        num_bytes = sum(map(len, parts))
        if self._has_failed or self._size + num_bytes > self._limit:
            return
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[self._file.write(view) :]
        except OSError as error:
            self._fail(error)
        else:
            self._size += num_bytes

    def _fail(self, error: OSError) -> None:
        """End the recording with its last whole record."""
        self._has_failed = True
        self.is_full = True
        self._log.warning("the recording has ended: the disk failed", reason=str(error))
        with contextlib.suppress(OSError):
            self._file.truncate(self._size)

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                work, num_bytes = taken
                work()
                del work, taken
                with self._changed:
                    self._held_bytes -= num_bytes
        finally:  # after a bug, too: nothing may wait for a thread that has ended
            self.is_full = True
            self._file.close()

    def _take(self) -> tuple[Work, int] | None:
        """Return the next work, or None if the file must be closed."""
        with self._changed:
            if not self._work:
                self._report_dropped()
            while not self._work and not self._is_closing:
                self._changed.wait()
            return self._work.popleft() if self._work else None

    def _report_dropped(self) -> None:
        if self._num_dropped:
            self._log.warning(
                "requests were not recorded: the disk is slower than they come",
                number=self._num_dropped,
            )
            self._num_dropped = 0
