"""How fast those who wait are served: requests that wait for their first token, or for a step."""

SHARE_OF_NEWEST = 0.1
"""Weight of the newest interval in the moving average."""


class Pace:
    """A moving average of the interval after which the next one that waits is served.

    Times are seconds of a monotonic clock, which the caller passes in.
    """

    def __init__(self) -> None:
        self._interval: float | None = None
        self._last: float | None = None
        """When the last one was served; None if nobody has waited since."""

    def on_served(self, now: float, num_waiting: int) -> None:
        """Record that one was served while `num_waiting` others still wait.

        Time in which nobody waits does not count, because it says nothing about the pace.
        """
        if self._last is not None:
            newest = now - self._last
            average = newest if self._interval is None else self._interval
            self._interval = average + SHARE_OF_NEWEST * (newest - average)
        self._last = now if num_waiting else None

    def expected_wait(self, num_waiting: int) -> float:
        """Return the seconds until this many are served; 0 if unknown."""
        return num_waiting * (self._interval or 0.0)
