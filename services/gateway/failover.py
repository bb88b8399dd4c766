"""Attempts and their retries: a lost request continues on other members.

An attempt starts once every stage has a connected member. If it is lost, the next attempt continues
after the tokens that the client already has.
"""

import asyncio
from collections.abc import Callable, Mapping

from common.errors import ServingError, Unavailable
from common.events import PeerDown
from common.logs import get_logger
from services.gateway.metrics import Metrics
from services.gateway.peers import Peers
from services.gateway.record import Attempt, Record

MAX_LOSSES = 10
"""A request fails when it has lost this many members."""
MAX_LOSSES_WITHOUT_TOKEN = 4
"""A request fails when it has lost this many members in a row without a token in between, because
the request itself may be what kills them."""
PATIENCE_SECONDS = 120.0
"""An interrupted request fails if it gets no token for this long."""
RETRY_SECONDS = 0.25
"""First retry delay after a stage reports a missing peer; it doubles up to 8 s."""
MAX_DOUBLINGS = 5


class Failover:
    """Starts, aborts and retries the attempts of all requests in flight.

    `records` are the requests in flight by id; their owner adds and removes them. `fail` ends a
    request with an error.
    """

    def __init__(
        self,
        records: Mapping[str, Record],
        peers: Peers,
        metrics: Metrics,
        fail: Callable[[Record, ServingError], None],
        patience: float = PATIENCE_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._records = records
        self._peers = peers
        self._metrics = metrics
        self._fail = fail
        self._patience = patience
        self._retry_seconds = retry_seconds
        self._waiting: dict[str, Record] = {}
        """Requests without an attempt, because a stage is missing or a retry is delayed."""
        self._log = get_logger()

    def start_attempt(self, record: Record) -> None:
        """Send the request to preprocess, or let it wait while a stage has no connected member."""
        record.cancel_timers("retry")
        if missing := self._peers.missing():
            self._waiting[record.id] = record
            reason = f"no {' and no '.join(missing)} is connected"
            self._interrupt(record, Unavailable(reason, missing[0], retry_after=1.0))
            return
        self._waiting.pop(record.id, None)
        attempts = [r.attempt for r in self._records.values()]
        preprocess = self._peers.choose("preprocess", (a.preprocess for a in attempts if not a.llm))
        detokenizer = self._peers.choose("detokenizer", (a.detokenizer for a in attempts))
        record.attempt.preprocess = preprocess.id
        record.attempt.detokenizer = detokenizer.id
        avoid = self._peers.group_to_avoid(record.avoid)
        self._peers.links.send(preprocess.id, record.submit_message(detokenizer, avoid))
        self._metrics.attempts.inc()

    def start_waiting(self) -> None:
        """Start an attempt for each waiting request. A new member is a reason to retry at once."""
        for record in list(self._waiting.values()):
            self.start_attempt(record)

    def on_peer_down(self, down: PeerDown) -> None:
        """Retry every request whose attempt is lost with this member."""
        for record in list(self._records.values()):
            if record.attempt.depends_on(down.peer_id):
                self._on_loss(record, down)

    def _on_loss(self, record: Record, down: PeerDown) -> None:
        reason = f"{down.role} was lost while it held the request: {down.reason}"
        error = Unavailable(reason, stage=down.role, retry_after=1.0)
        record.losses += 1
        record.losses_without_token += 1
        if record.losses == MAX_LOSSES or record.losses_without_token == MAX_LOSSES_WITHOUT_TOKEN:
            error.message += f"; given up because the request has lost {record.losses} members"
            self._fail(record, error)
            return
        if down.role == "llm":
            record.avoid = down.peer_id
        self._end_attempt(record, error)
        self.start_attempt(record)

    def retry_later(self, record: Record, error: Unavailable) -> None:
        """Retry after a delay, because a stage reported that it cannot reach another one.

        The missing peer may be gone, or the stage that reported it may not know the peer yet.
        """
        if error.stage == "llm":
            record.avoid = record.attempt.llm
        self._end_attempt(record, error)
        delay = self._retry_seconds * 2 ** min(record.retries, MAX_DOUBLINGS)
        record.retries += 1
        self._waiting[record.id] = record
        loop = asyncio.get_running_loop()
        record.timers["retry"] = loop.call_later(delay, self.start_attempt, record)

    def on_first_token(self, record: Record) -> None:
        """Reset the counters of the request: the first token of an attempt proves that it works."""
        record.attempt.is_answering = True
        record.losses_without_token = 0
        record.retries = 0
        record.interruption = None
        record.cancel_timers("patience")

    def abort(self, record: Record) -> None:
        """Make every stage that holds the request free it.

        The language group passes the abort on to the detokenizer, and preprocess to vision.
        """
        for peer_id in (record.attempt.preprocess, record.attempt.llm):
            if peer_id:
                self._peers.send_abort(peer_id, record.abort_message())

    def forget(self, record: Record) -> None:
        """Drop what is kept for a request that has ended and is no longer among the records."""
        self._waiting.pop(record.id, None)
        record.cancel_timers()
        self.release_detokenizers()

    def release_detokenizers(self) -> None:
        """Release the draining detokenizers that hold no answer of this gateway any more."""
        for peer_id in self._peers.draining("detokenizer"):
            if not any(record.attempt.detokenizer == peer_id for record in self._records.values()):
                self._peers.send_released(peer_id)

    def _end_attempt(self, record: Record, error: Unavailable) -> None:
        self.abort(record)
        record.attempt = Attempt(record.attempt.number + 1)
        self._metrics.failovers.labels(error.stage).inc()
        self._log.warning(
            "retrying", request_id=record.id, attempt=record.attempt.number, reason=error.message
        )
        self._interrupt(record, error)
        self.release_detokenizers()

    def _interrupt(self, record: Record, error: Unavailable) -> None:
        """Remember the first cause of the interruption, and fail the request if it lasts."""
        if record.interruption is None:
            record.interruption = error
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._patience, self._on_patience_end, record, error)
            record.timers["patience"] = timer

    def _on_patience_end(self, record: Record, error: Unavailable) -> None:
        error.message += f"; no replacement was available within {self._patience:g} s"
        self._fail(record, error)
