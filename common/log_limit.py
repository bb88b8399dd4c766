"""The limit on log lines of one cause, so that what a client or a peer repeats fills no log."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

MAX_LINES = 10
MAX_ENDS = 10_000
"""The lines of one cause that may pass if they say how a request ended without an answer."""
WINDOW_SECONDS = 10.0
MAX_CAUSES = 1000
MAX_REPORTED_CAUSES = 10
MAX_CAUSE_CHARS = 100

Cause = tuple[int, str]
"""(level, event)."""
OTHER: Cause = (logging.WARNING, "other causes")


@dataclass(slots=True)
class Window:
    """The lines of one cause in the current WINDOW_SECONDS."""

    began: float
    num_lines: int = 0
    num_left_out: int = 0
    """How many lines were left out since the last one that was written."""


class LogLimit(logging.Filter):
    """A filter that lets MAX_LINES lines of one cause pass in WINDOW_SECONDS.

    The next line that passes has an attribute `left_out`: how many did not. Lines have one cause if
    they have the same level and the same event; for a library, the same message before its
    arguments are filled in. If there are too many causes, new ones count as one.

    A line below "warning" which names a request always passes. There is one such line for a
    request that was admitted, so admission limits their rate, and each says something else. Nothing
    limits the rate of requests that are refused. Of the lines that name a request and its status,
    MAX_ENDS pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[Cause, Window] = {}
        self._next_cleaning = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line may be written."""
        is_end = names(record, "request_id", "status")
        if record.levelno < logging.WARNING and names(record, "request_id") and not is_end:
            return True
        most = MAX_ENDS if is_end else MAX_LINES
        now = self._clock()
        with self._lock:
            window = self._window_of(cause_of(record), now)
            if now - window.began >= WINDOW_SECONDS:
                window.began = now
                window.num_lines = 0
            window.num_lines += 1
            if window.num_lines > most:
                window.num_left_out += 1
                return False
            record.left_out = window.num_left_out
            window.num_left_out = 0
        return True

    def take_left_out(self) -> dict[str, int]:
        """Return how many lines were left out and not reported, by event, and forget them.

        Only the events with the most have an entry of their own.
        """
        counts = Counter[str]()
        with self._lock:
            for (_, event), window in self._windows.items():
                counts[event] += window.num_left_out
            self._windows.clear()
        most = {event: count for event, count in counts.most_common(MAX_REPORTED_CAUSES) if count}
        if rest := counts.total() - sum(most.values()):
            most[OTHER[1]] = rest
        return most

    def _window_of(self, cause: Cause, now: float) -> Window:
        if cause not in self._windows and len(self._windows) >= MAX_CAUSES:
            self._clean(now)
            if len(self._windows) >= MAX_CAUSES:
                cause = OTHER
        return self._windows.setdefault(cause, Window(now))

    def _clean(self, now: float) -> None:
        """Forget causes of which no line came recently, unless a count must be reported."""
        if now < self._next_cleaning:
            return
        self._next_cleaning = now + WINDOW_SECONDS
        self._windows = {
            cause: window
            for cause, window in self._windows.items()
            if window.num_left_out or now - window.began < WINDOW_SECONDS
        }


def cause_of(record: logging.LogRecord) -> Cause:
    """Return the cause of a line: of a structlog line, or of one by a library."""
    event = record.msg["event"] if isinstance(record.msg, dict) else record.msg
    first_line, _, _ = str(event)[: 2 * MAX_CAUSE_CHARS].partition("\n")
    return record.levelno, first_line[:MAX_CAUSE_CHARS]


def names(record: logging.LogRecord, *fields: str) -> bool:
    return isinstance(record.msg, dict) and all(field in record.msg for field in fields)
