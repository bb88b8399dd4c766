"""Which requests are admitted: those that find room in the queue and can meet their deadline."""

from collections.abc import Callable

from common.errors import Exhausted, ServingError, Unavailable
from common.pace import Pace
from services.gateway.peers import Peers

OUTAGE_SECONDS = 30.0
"""A request is admitted and waits if a stage lost its last member more recently than this, because
the launcher is probably restarting that member."""


class Admission:
    """Refuses the requests that the system could not answer in time."""

    def __init__(self, peers: Peers, max_waiting: int) -> None:
        self.pace = Pace()
        self._peers = peers
        self._max_waiting = max_waiting
        self._closed_reason = ""

    def close(self, reason: str) -> None:
        """Refuse all requests from now on, with this reason."""
        self._closed_reason = reason

    def check(
        self, waiting: int, timeout: float, seconds_left: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Raise an error if a request with this timeout (seconds) must be refused.

        `waiting` is the number of admitted requests that have no token yet. `seconds_left` returns
        how long the requests in flight take until the first of them ends. A refused client should
        wait for that long at least: the pace alone says little before many were served.

        Raises
        ------
        Unavailable
            if the gateway is stopping, or a stage is missing that was not lost just now.
        Exhausted
            if too many requests wait, either in total or to meet the deadline.
        """
        if self._closed_reason:
            raise unavailable(self._closed_reason, "stopping")
        if missing := self._peers.missing(min_seconds=OUTAGE_SECONDS):
            reason = f"no {' and no '.join(missing)} is connected: try again in a moment"
            raise unavailable(reason, "stage_missing")
        wait = self.pace.expected_wait(waiting)
        if waiting >= self._max_waiting:
            reason = f"{waiting} requests are waiting, which is the limit: try again later"
            raise exhausted(reason, "too_many_waiting", max(1.0, wait, seconds_left()))
        if wait > timeout:
            reason = (
                f"{waiting} requests are waiting, which takes about {wait:.0f} s, but the "
                f"deadline is in {timeout:g} s: try again later, or allow more time"
            )
            raise exhausted(
                reason, "deadline_unreachable", max(1.0, wait - timeout, seconds_left())
            )


def unavailable(reason: str, cause: str) -> ServingError:
    return Unavailable(reason, "gateway", retry_after=1.0, cause=cause)


def exhausted(reason: str, cause: str, retry_after: float) -> ServingError:
    return Exhausted(reason, "gateway", retry_after=retry_after, cause=cause)
