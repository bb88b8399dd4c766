"""Who is let in: while few enough wait, and their deadlines can be met."""

from common.errors import Exhausted, Unavailable
from services.gateway.pace import Pace
from services.gateway.peers import Peers

OUTAGE_SECONDS = 30.0
"""A stage whose last member went so recently is being restarted: a request may as well wait for it
here."""


class Admission:
    def __init__(self, peers: Peers, max_waiting: int) -> None:
        self._peers = peers
        self._max_waiting = max_waiting
        self.pace = Pace()
        self.closed = ""
        """Why nothing new is taken, for clients; empty while it is."""

    def check(self, waiting: int, timeout: float) -> None:
        """`waiting` counts the requests without their first token.

        Raises
        ------
        Unavailable
            where a stage is not there and was not lost just now, or the gateway is leaving.
        Exhausted
            where too many wait, or too many for the deadline in `timeout` seconds.
        """
        if self.closed:
            raise Unavailable(self.closed, stage="gateway", retry_after=1.0, cause="stopping")
        if missing := self._peers.missing(since=OUTAGE_SECONDS):
            raise Unavailable(
                f"no {' and no '.join(missing)} is connected: try again in a moment",
                "gateway",
                retry_after=1.0,
                cause="stage_missing",
            )
        wait = self.pace.expected_wait(waiting)
        if waiting >= self._max_waiting:
            reason = f"{waiting} requests are waiting, which is the limit: try again later"
            raise Exhausted(reason, "gateway", retry_after=max(1.0, wait), cause="too_many_waiting")
        if wait > timeout:
            reason = (
                f"{waiting} requests are waiting and take about {wait:.0f} s, the "
                f"deadline is in {timeout:g} s: try again later"
            )
            raise Exhausted(
                reason,
                "gateway",
                retry_after=max(1.0, wait - timeout),
                cause="deadline_unreachable",
            )
