"""How fast waiting requests come to their first token: what a Retry-After is computed from."""

SHARE_OF_NEWEST = 0.1


class Pace:
    """Times are seconds of a monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._interval: float | None = None
        self._last: float | None = None

    def first_token(self, now: float, num_waiting: int) -> None:
        """One that waited has its first token, and so many still wait. Only what passes while some
        wait is the system's pace."""
        if self._last is not None:
            passed = now - self._last
            old = passed if self._interval is None else self._interval
            self._interval = old + SHARE_OF_NEWEST * (passed - old)
        self._last = now if num_waiting else None

    def expected_wait(self, num_waiting: int) -> float:
        """Seconds until so many waiting requests have their first tokens; 0 while nothing was
        measured."""
        return num_waiting * (self._interval or 0.0)
