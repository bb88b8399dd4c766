"""The monotonic clock of a fuzzed process, which can be stopped and put forward.

It is put in the place of `time.monotonic` when this module is imported. That must come before the
services are imported, because some of them keep the function as a default.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

TICK_SECONDS = 1e-6
"""What passes between two looks at a stopped clock, so that no two moments are the same."""


class Clock:
    """Real time until it is stopped, plus what was put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._real = time.monotonic
        self._stopped: float | None = None

    def __call__(self) -> float:
        if self._stopped is None:
            return self._real() + self.ahead
        self.ahead += TICK_SECONDS
        return self._stopped + self.ahead

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let no time pass by itself, so that a busy machine changes nothing.

        Begin with nothing put forward: far in the future, the clock would be inexact.
        """
        self.ahead = 0.0
        self._stopped = self._real()
        try:
            yield
        finally:
            self._stopped = None
            self.ahead = 0.0


CLOCK = Clock()
time.monotonic = CLOCK  # type: ignore[assignment]
