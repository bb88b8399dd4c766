"""The monotonic clock of a fuzzed process, which can be put forward.

It is put in the place of `time.monotonic` when this module is imported. That must come before the
services are imported, because some of them keep the function as a default.
"""

import time


class Clock:
    """Real time, plus what was put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._real = time.monotonic

    def __call__(self) -> float:
        return self._real() + self.ahead


CLOCK = Clock()
time.monotonic = CLOCK  # type: ignore[assignment]
