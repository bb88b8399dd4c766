"""Attempts and their retries: a lost request continues on other members.

An attempt starts once every stage has a connected member. If it is lost, the next attempt continues
after the tokens that the client already has.

`blame.py` decides which of the lost requests may have been the cause of the loss. They are retried
apart from the others.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping

from common.errors import ServingError, Unavailable
from common.events import PeerDown
from common.logs import get_logger
from common.messages import NO_PEER, Cleared, Noted
from common.tracing import NO_TRACING, Tracing
from services.gateway.blame import PASSED_TOKENS, Loss, acquit, assign_blame, verdict
from services.gateway.metrics import Metrics
from services.gateway.peers import Peers
from services.gateway.record import Attempt, Record

MAX_LOSSES = 10
"""A request fails when it has lost this many members for which no other request was to blame."""
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
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._records = records
        self._peers = peers
        self._metrics = metrics
        self._fail = fail
        self._patience = patience
        self._retry_seconds = retry_seconds
        self._tracing = tracing
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
        attempts = [r.attempt for r in self._records.values() if r.lead is r]
        preprocess = self._peers.choose("preprocess", (a.preprocess for a in attempts if not a.llm))
        detokenizer = NO_PEER
        if record.task == "generate":
            detokenizer = self._peers.choose("detokenizer", (a.detokenizer for a in attempts))
        for joint in record.joint_records:
            joint.attempt.preprocess = preprocess.id
            joint.attempt.detokenizer = detokenizer.id
        record.attempt.begin_span(self._tracing, record.request.span)
        avoid = self._peers.group_to_avoid(record.avoid)
        self._peers.links.send(preprocess.id, record.submit_message(detokenizer, avoid))
        self._metrics.attempts.inc()

    def start_waiting(self) -> None:
        """Start an attempt for each waiting request. A new member is a reason to retry at once."""
        for record in sorted(self._waiting.values(), key=lambda record: record.request.priority):
            self.start_attempt(record)

    def on_peer_down(self, down: PeerDown) -> None:
        """Retry every request whose attempt is lost with this member, the suspects apart."""
        losses = list(self._losses(down))
        blamed = assign_blame(losses, down)
        is_proven = any(loss.was_alone(down) for loss in losses)
        # The least suspicious first, so that they need not wait for another death.
        for loss in sorted(losses, key=lambda loss: loss.record.choices.deaths[down.role]):
            record = loss.record
            if record.id not in self._records:
                continue  # the failure of another answer has just ended this request
            if record in blamed or not is_proven:
                record.losses += 1
            error = self._reason_to_fail(record, down, record in blamed)
            if error:
                self._fail(record, error)
            elif loss.attempt is record.attempt or record in blamed:
                self._on_loss(record, down)

    def _losses(self, down: PeerDown) -> Iterator[Loss]:
        """Yield the attempts that are lost with a member, and those whose loss another stage has
        just reported."""
        for record in [record for record in self._records.values() if record.lead is record]:
            if record.attempt.depends_on(down.peer_id):
                yield Loss(record, record.attempt)
            elif record.reported and record.reported.llm == down.peer_id:
                yield Loss(record, record.reported)
                record.reported = None

    def _reason_to_fail(
        self, record: Record, down: PeerDown, is_blamed: bool
    ) -> ServingError | None:
        if is_blamed and (error := verdict(record, down)):
            return error
        if record.losses < MAX_LOSSES:
            return None
        error = _loss_of(down)
        error.message += f"; given up because the request has lost {record.losses} members"
        return error

    def _on_loss(self, record: Record, down: PeerDown) -> None:
        if down.role == "llm":
            record.avoid = down.peer_id
        self._end_attempt(record, _loss_of(down))
        self.start_attempt(record)

    def retry_later(self, record: Record, error: Unavailable) -> None:
        """Retry after a delay, because a stage reported that it cannot reach another one.

        The missing peer may be gone, or the stage that reported it may not know the peer yet.
        """
        record = record.lead
        if error.stage == "llm":
            record.avoid = record.attempt.llm
            record.reported = record.attempt
        self._end_attempt(record, error)
        delay = self._retry_seconds * 2 ** min(record.retries, MAX_DOUBLINGS)
        record.retries += 1
        self._waiting[record.id] = record
        loop = asyncio.get_running_loop()
        record.timers["retry"] = loop.call_later(delay, self.start_attempt, record)

    def on_first_token(self, record: Record) -> None:
        """Reset the counters of the request: the first token of an attempt proves that it works."""
        record.attempt.is_answering = True
        record.reported = None
        record.retries = 0
        record.interruption = None
        record.cancel_timers("patience")

    # Requests that are worked on apart

    def on_alone(self, record: Record, peer_id: str) -> None:
        """A member works on nothing but this request from now on."""
        record.attempt.alone_at.add(peer_id)
        self._peers.links.send(peer_id, Noted(**record.ids))

    def on_routed(self, record: Record) -> None:
        """The request has passed preprocess. From now on, each of its answers is retried alone."""
        record.choices.is_joint = False
        self._clear(record, "preprocess", record.attempt.preprocess)

    def on_tokens(self, record: Record, is_end: bool) -> None:
        """The request has passed the language group and the detokenizer once it has made a few
        tokens or has ended."""
        if is_end or record.num_new_tokens >= PASSED_TOKENS:
            acquit(record, "detokenizer")
            self._clear(record, "llm", record.attempt.llm)

    def _clear(self, record: Record, role: str, peer_id: str) -> None:
        acquit(record, role)
        if peer_id in record.attempt.alone_at:
            record.attempt.alone_at.remove(peer_id)
            self._peers.links.send(peer_id, Cleared(**record.ids))

    def abort(self, record: Record) -> None:
        """Make every stage that holds the request free it.

        The language group passes the abort on to the detokenizer, and preprocess to vision.
        """
        for peer_id in (record.attempt.preprocess, record.attempt.llm):
            if peer_id and record.lead is record:
                self._peers.send_abort(peer_id, record.abort_message())

    def forget(self, record: Record) -> None:
        """Drop what is kept for a request that has ended and is no longer among the records."""
        self._waiting.pop(record.id, None)
        record.cancel_timers()
        record.attempt.end_span()
        self.release_detokenizers()

    def release_detokenizers(self) -> None:
        """Release the draining detokenizers that hold no answer of this gateway any more."""
        for peer_id in self._peers.draining("detokenizer"):
            if not any(record.attempt.detokenizer == peer_id for record in self._records.values()):
                self._peers.send_released(peer_id)

    def _end_attempt(self, record: Record, error: Unavailable) -> None:
        self.abort(record)
        record.attempt.end_span(error.message)
        for joint in record.joint_records:
            joint.attempt = Attempt(joint.attempt.number + 1, num_resumed=len(joint.token_ids))
        self._metrics.failovers.labels(error.stage).inc()
        self._log.warning(
            "retrying", **record.log_ids, attempt=record.attempt.number, reason=error.message
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


def _loss_of(down: PeerDown) -> Unavailable:
    reason = f"{down.role} was lost while it held the request: {down.reason}"
    return Unavailable(reason, stage=down.role, retry_after=1.0)
