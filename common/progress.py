"""Liveness: the work loop stamps its progress, and the heartbeats report how old the stamp is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.starvation import Starvation

LEASE_SECONDS = 3.0
"""A member that is silent for this long is dead to its peers and to the controller."""
LEAST_PATIENCE_SECONDS = 3.0
PATIENCE_FACTOR = 4.0
"""A unit of work is hung when it takes this many times as long as expected."""
PAUSE_SECONDS = 2.0
"""The watcher looks every second. If it has not looked for this long, the whole process was
stopped."""
MOST_STARVED = 0.9
"""The share of the time that waiting for a core can explain, so that every hang is found."""
LOADING_SECONDS = 75.0
"""The expected time between two stamps while weights load."""
UNMEASURED_SECONDS = 15.0
"""The expected time of the very first unit, which may compile kernels or read weights from disk."""
SHARE_KEPT = 0.95
"""How much of a measured time is kept when the next unit of its bucket is faster."""


class Progress:
    """Stamped by the work loop, watched by the I/O thread, read by any thread.

    A loop that waits for events is idle, and an idle loop is never hung. Only watched time counts:
    a process that was stopped as a whole is not hung when it continues. Nor does the time count
    that a thread waits for a core: a process that other processes keep from running is not hung.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        starvation: Callable[[], float] | None = None,
    ) -> None:
        """`starvation` returns the seconds that a thread has waited for a core since it was called
        last."""
        self._clock = clock
        self._starvation = starvation or Starvation().since_last
        self._stamped = self._watched = clock()
        self._starved = 0.0
        """The seconds that the units of work so far have waited for a core."""
        self._starved_before = 0.0
        """What `_starved` was at the stamp."""
        self._patience: float | None = None
        self._others: list[Progress] = []

    def include(self, other: "Progress") -> None:
        """Count another thread's work as this one's: this is hung if either of them is."""
        self._others.append(other)

    def begin(self, expected_seconds: float = 0.0) -> None:
        """Stamp the beginning of a unit of work.

        Without a further stamp it is hung after max(3 s, 4 x `expected_seconds`).
        """
        self.tick()
        self._patience = max(LEAST_PATIENCE_SECONDS, PATIENCE_FACTOR * expected_seconds)

    def tick(self) -> None:
        """Stamp progress of the current unit."""
        self._stamped = self._clock()
        self._starved_before = self._starved

    def idle(self) -> None:
        """Note that the loop waits for events, which is not a hang however long it takes."""
        self._patience = None

    @contextmanager
    def unit(self, times: "UnitTimes", size: int) -> Iterator[None]:
        """Run one unit of work within the time that its size allows, and measure it.

        A unit may be a part of another one, which goes on after it with its own patience.
        """
        began = self._clock()
        patience = self._patience
        self.begin(times.expected(size))
        yield
        times.measured(size, self._clock() - began)
        self.begin()
        self._patience = max(patience or 0.0, LEAST_PATIENCE_SECONDS)

    def watch(self) -> None:
        """Let time count. The thread that sends the heartbeats calls this every second."""
        now = self._clock()
        elapsed = now - self._watched
        if elapsed > PAUSE_SECONDS:
            self._stamped = now
        if self._patience is not None:
            self._starved += min(self._starvation(), MOST_STARVED * elapsed)
        self._watched = now
        for other in self._others:
            other.watch()

    def age(self) -> float:
        """Return the seconds of work from the stamp to the last `watch`; 0 while idle."""
        return max([self._own_age(), *(other.age() for other in self._others)])

    def is_hung(self) -> bool:
        """Whether the current unit of work has gone without a stamp for too long."""
        patience = self._patience
        return (patience is not None and self._own_age() > patience) or any(
            other.is_hung() for other in self._others
        )

    def _own_age(self) -> float:
        if self._patience is None:
            return 0.0
        starved = self._starved - self._starved_before
        return max(0.0, self._watched - self._stamped - starved)


class UnitTimes:
    """How long units of work take, in buckets of sizes that double.

    The expected time is close to the longest of the recent units.
    """

    def __init__(self, least_seconds: float = 0.0) -> None:
        """Expect at least `least_seconds` of every unit, for work whose size says little."""
        self._least = least_seconds
        self._seconds = dict[int, float]()

    def expected(self, size: int) -> float:
        """Return the seconds that a unit of this size may take.

        A bucket without a measurement is extrapolated from the nearest measured one; a smaller
        size is not expected to be faster.
        """
        if not self._seconds:
            return UNMEASURED_SECONDS
        bucket = size.bit_length()
        nearest = min(self._seconds, key=lambda measured: abs(measured - bucket))
        return max(self._least, self._seconds[nearest] * 2.0 ** max(0, bucket - nearest))

    def measured(self, size: int, seconds: float) -> None:
        """Record how long a unit of this size took."""
        bucket = size.bit_length()
        self._seconds[bucket] = max(seconds, SHARE_KEPT * self._seconds.get(bucket, 0.0))
