"""How fast waiting requests get their first token. Retry-After is computed from it."""

SHARE_OF_NEWEST = 0.1
"""Weight of the newest interval in the moving average."""


class Pace:
    """A moving average of the interval between two first tokens.

    Times are seconds of a monotonic clock, which the caller passes in.
    """

    def __init__(self) -> None:
        self._interval: float | None = None
        self._last: float | None = None
        """When the last first token came; None if no request has waited since."""

    def on_first_token(self, now: float, num_waiting: int) -> None:
        """Record that a request got its first token while `num_waiting` others still wait.

        Time in which no request waits does not count, because it says nothing about the pace.
        """
        if self._last is not None:
            newest = now - self._last
            average = newest if self._interval is None else self._interval
            self._interval = average + SHARE_OF_NEWEST * (newest - average)
        self._last = now if num_waiting else None

    def expected_wait(self, num_waiting: int) -> float:
        """Return the seconds until this many requests have their first token; 0 if unknown."""
        return num_waiting * (self._interval or 0.0)
