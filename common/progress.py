"""Liveness as the work loop tells it: a stamp of its progress, which the I/O thread shows to
everyone else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LEASE_SECONDS = 3.0
"""A member that is silent for this long is dead to its peers and to the controller."""
LEAST_PATIENCE_SECONDS = 3.0
PATIENCE_FACTOR = 4.0
PAUSE_SECONDS = 2.0
"""The watcher looks every second: where it did not for so long, the whole process stood still."""
LOADING_SECONDS = 75.0
"""Expected between two signs of progress while weights load; four times as long is a hang."""
UNMEASURED_SECONDS = 15.0
"""Expected of the first unit of all, which may compile kernels or read weights that are not in
memory yet."""
SHARE_KEPT = 0.95


class Progress:
    """Stamped by the work loop, watched by the I/O thread, read by any thread.

    A loop that waits for events is idle, and never hung. The age counts watched time only: a
    process that was stopped for a while as a whole is not hung when it goes on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stamped = self._watched = clock()
        self._patience: float | None = None
        self._others: list[Progress] = []

    def include(self, other: "Progress") -> None:
        """Another thread's work counts as this one's: it is hung where either is."""
        self._others.append(other)

    def begin(self, expected_seconds: float = 0.0) -> None:
        """A unit of work begins: without a further stamp it is hung after max(3 s, 4 x
        `expected_seconds`)."""
        self._stamped = self._clock()
        self._patience = max(LEAST_PATIENCE_SECONDS, PATIENCE_FACTOR * expected_seconds)

    def tick(self) -> None:
        """The unit under way makes progress."""
        self._stamped = self._clock()

    def idle(self) -> None:
        self._patience = None

    @contextmanager
    def unit(self, times: "UnitTimes", size: int) -> Iterator[None]:
        """One unit of work of a size that was, or is from now on, measured."""
        began = self._clock()
        self.begin(times.expected(size))
        yield
        times.measured(size, self._clock() - began)
        self.begin()

    def watch(self) -> None:
        """Called every second by the thread that tells others of the progress."""
        now = self._clock()
        if now - self._watched > PAUSE_SECONDS:
            self._stamped = now
        self._watched = now
        for other in self._others:
            other.watch()

    def age(self) -> float:
        """Seconds from the stamp to the last look; 0 while idle."""
        return max([self._own_age(), *(other.age() for other in self._others)])

    def is_hung(self) -> bool:
        patience = self._patience
        return (patience is not None and self._own_age() > patience) or any(
            other.is_hung() for other in self._others
        )

    def _own_age(self) -> float:
        return 0.0 if self._patience is None else max(0.0, self._watched - self._stamped)


class UnitTimes:
    """How long units of work take, in buckets of sizes that double. What is told is near the
    longest of the last ones."""

    def __init__(self, least_seconds: float = 0.0) -> None:
        """At least `least_seconds` are expected of every unit: for work of which the size says
        little."""
        self._least = least_seconds
        self._seconds = dict[int, float]()

    def expected(self, size: int) -> float:
        """Measured in the size's bucket; else what the nearest measured one lets expect, and not
        less than it took."""
        if not self._seconds:
            return UNMEASURED_SECONDS
        bucket = size.bit_length()
        nearest = min(self._seconds, key=lambda measured: abs(measured - bucket))
        return max(self._least, self._seconds[nearest] * 2.0 ** max(0, bucket - nearest))

    def measured(self, size: int, seconds: float) -> None:
        bucket = size.bit_length()
        self._seconds[bucket] = max(seconds, SHARE_KEPT * self._seconds.get(bucket, 0.0))
