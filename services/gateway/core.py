"""The gateway's core: it owns every request from admission to its one end."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import assert_never

from common.errors import (
    DeadlineExceeded,
    Exhausted,
    Internal,
    NotFound,
    ServingError,
    Unavailable,
    from_code,
)
from common.events import Event as LinkEvent
from common.events import PeerDown, PeerDraining, PeerUp, Received, Sender
from common.logs import get_logger
from common.messages import (
    Abort,
    Delta,
    Failed,
    GatewayInbound,
    GatewayOutbound,
    HandedOver,
    Routed,
)
from services.gateway.admission import Admission
from services.gateway.generation import Began, Ended, Event, GenerationRequest
from services.gateway.metrics import Metrics
from services.gateway.peers import Peers
from services.gateway.record import Attempt, Record

MAX_LOSSES = 10
"""Members that may be lost with one request in hand."""
MAX_LOSSES_WITHOUT_TOKEN = 4
"""Of them in a row, without a token between them: the request may be what kills them."""
PATIENCE_SECONDS = 120.0
"""A request that cannot go on just now waits so long for someone to take it, if its deadline
allows."""
RETRY_SECONDS = 0.25
"""Before the first try anew where a stage says that another is not there; twice as long before each
next one, up to 8 s."""
MAX_DOUBLINGS = 5
MAX_UNREAD = 10_000
"""Events that a client may leave unread: what it does not read lies here."""


class GatewayCore:
    """Runs on one asyncio loop; `on_event` and `on_members` are called on it, too."""

    def __init__(
        self,
        model_name: str,
        max_waiting: int,
        request_timeout: float,
        metrics: Metrics | None = None,
        patience: float = PATIENCE_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.model_name = model_name
        self.metrics = metrics or Metrics()
        self.peers = Peers()
        self.max_model_len = self.peers.max_model_len
        self.on_members = self.peers.on_members
        self._request_timeout = request_timeout
        self._patience = patience
        self._retry_seconds = retry_seconds
        self._admission = Admission(self.peers, max_waiting)
        self._name = secrets.token_hex(3)
        self._num_admitted = 0
        self._num_waiting = 0
        self._records: dict[str, Record] = {}
        self._unplaced: dict[str, Record] = {}
        """Of them, those that nobody holds until there is one of each stage."""
        self.idle = asyncio.Event()
        self.idle.set()
        self.is_draining = False
        self._log = get_logger()

    @property
    def links(self) -> Sender[GatewayOutbound]:
        return self.peers.links

    @links.setter
    def links(self, links: Sender[GatewayOutbound]) -> None:
        self.peers.links = links

    # What the doors call

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        record = self._admit(request)
        try:
            async with contextlib.aclosing(self._events(record)) as events:
                yield events
        finally:
            if record.id in self._records:
                self._abort(record)
                self._forget(record)

    def check_model(self, model: str | None) -> None:
        if model and model != self.model_name:
            raise NotFound(f"no model {model!r} is served here; served: {self.model_name!r}")

    def unready_reason(self) -> str:
        return "the gateway is draining" if self.is_draining else self.peers.unready_reason()

    def drain(self) -> None:
        """Not ready from now on; what comes nevertheless is answered."""
        self.is_draining = True

    async def stop(self, grace: float) -> None:
        """Refuses new requests, lets those under way end within the grace (seconds), and ends the
        others with an error."""
        self._admission.closed = "the gateway is stopping: try again"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), grace)
        for record in list(self._records.values()):
            self._fail(
                record, Unavailable(self._admission.closed, stage="gateway", retry_after=1.0)
            )

    def load(self) -> tuple[int, int]:
        """(in_flight, queued) for the control plane: requests with and without a first token, from
        their admission on."""
        waiting = self._num_waiting
        return max(0, len(self._records) - waiting), waiting

    # What the connections tell

    def on_event(self, event: LinkEvent[GatewayInbound]) -> None:
        match event:
            case Received(message=message):
                self._handle_message(message)
            case PeerUp():
                self.peers.add(event)
                for record in list(self._unplaced.values()):
                    self._place(record)
            case PeerDown(peer_id=peer_id, reason=reason):
                self.peers.remove(event)
                self._log.warning("peer gone", peer=peer_id, reason=reason)
                for record in [r for r in self._records.values() if r.attempt.depends_on(peer_id)]:
                    self._lose(record, event)
            case PeerDraining(peer_id=peer_id):
                self.peers.drain(peer_id)
                self._release()

    # From here on ours: admission

    def _admit(self, request: GenerationRequest) -> Record:
        timeout = self._request_timeout if request.timeout is None else request.timeout
        self._admission.check(self._num_waiting, timeout)
        self._num_admitted += 1
        record = Record(
            request, f"{request.request_id}~{self._name}{self._num_admitted:x}", timeout
        )
        self._place(record)
        self._records[record.id] = record
        self._count_waiting(1)
        self.idle.clear()
        record.timers["deadline"] = asyncio.get_running_loop().call_later(
            timeout, self._expire, record
        )
        return record

    def _count_waiting(self, change: int) -> None:
        self._num_waiting += change
        self.metrics.waiting.set(self._num_waiting)

    async def _events(self, record: Record) -> AsyncGenerator[Event, None]:
        while True:
            event = await record.events.get()
            if isinstance(event, ServingError):
                raise event
            yield event
            if isinstance(event, Ended):
                return

    # Attempts

    def _place(self, record: Record) -> None:
        """Begins the attempt where there is one of each stage; else the record waits until there
        is."""
        record.cancel_timers("retry")
        if missing := self.peers.missing():
            self._unplaced[record.id] = record
            self._interrupt(
                record,
                Unavailable(
                    f"no {' and no '.join(missing)} is connected", missing[0], retry_after=1.0
                ),
            )
            return
        self._unplaced.pop(record.id, None)
        attempts = [r.attempt for r in self._records.values()]
        preprocess = self.peers.choose("preprocess", (a.preprocess for a in attempts if not a.llm))
        detokenizer = self.peers.choose("detokenizer", (a.detokenizer for a in attempts))
        record.attempt.preprocess = preprocess.id
        record.attempt.detokenizer = detokenizer.id
        self.links.send(
            preprocess.id, record.submit(detokenizer, self.peers.to_avoid(record.avoid))
        )
        self.metrics.attempts.inc()

    def _lose(self, record: Record, down: PeerDown) -> None:
        """A new attempt goes on after the tokens that the client has, as soon as another can take
        the place of the one lost."""
        error = Unavailable(
            f"{down.role} was lost while it held the request: {down.reason}",
            stage=down.role,
            retry_after=1.0,
        )
        record.losses = record.losses + 1
        record.losses_without_token = record.losses_without_token + 1
        if record.losses == MAX_LOSSES or record.losses_without_token == MAX_LOSSES_WITHOUT_TOKEN:
            error.message += f"; given up after {record.losses} such losses"
            self._fail(record, error)
            return
        if down.role == "llm":
            record.avoid = down.peer_id
        self._begin_anew(record, error)
        self._place(record)

    def _retry(self, record: Record, error: Unavailable) -> None:
        """A stage cannot reach another: that one may be gone, or may not be known there yet."""
        if error.stage == "llm":
            record.avoid = record.attempt.llm
        self._begin_anew(record, error)
        wait = self._retry_seconds * 2 ** min(record.retries, MAX_DOUBLINGS)
        record.retries += 1
        self._unplaced[record.id] = record
        record.timers["retry"] = asyncio.get_running_loop().call_later(wait, self._place, record)

    def _begin_anew(self, record: Record, error: Unavailable) -> None:
        self._abort(record)
        record.attempt = Attempt(record.attempt.number + 1)
        self.metrics.failovers.labels(error.stage).inc()
        self._log.warning(
            "begins anew", request_id=record.id, attempt=record.attempt.number, reason=error.message
        )
        self._interrupt(record, error)
        self._release()

    def _interrupt(self, record: Record, error: Unavailable) -> None:
        if record.interruption is None:
            record.interruption = error
            record.timers["patience"] = asyncio.get_running_loop().call_later(
                self._patience, self._give_up, record
            )

    def _give_up(self, record: Record) -> None:
        error = record.interruption
        assert error is not None
        error.message += f"; nobody could take its place within {self._patience:g} s"
        self._fail(record, error)

    # Answers

    def _handle_message(self, message: GatewayInbound) -> None:
        record = self._records.get(message.request_id)
        if record is None or record.attempt.number != message.attempt:
            if isinstance(message, Routed):  # it ended before we knew whom to tell
                self.links.connect(message.llm, "llm")
                self.links.send(message.llm.id, Abort(**message.ids))
            return
        match message:
            case Routed(llm=llm, prompt_token_ids=ids):
                record.attempt.llm = llm.id
                record.prompt_token_ids = None if ids is None else ids.numpy().tolist()
                self.links.connect(llm, "llm")
                early = record.attempt.early
                record.attempt.early = []
                for delta in early:
                    self._handle_message(delta)
            case HandedOver():
                record.attempt.is_encoded = True
            case Delta() if not record.attempt.llm:
                record.attempt.early.append(message)
            case Delta():
                self._extend(record, message)
            case Failed(item=int()) if record.attempt.is_answering:
                pass  # the prefix cache had that image: the answer goes on without it
            case Failed():
                self._handle_failure(record, message)
            case _:
                assert_never(message)

    def _handle_failure(self, record: Record, failed: Failed) -> None:
        error = from_code(failed.code, failed.message, failed.stage, failed.item)
        if isinstance(error, Unavailable) and failed.item is None:
            self._retry(record, error)
        else:
            self._fail(record, error)

    def _extend(self, record: Record, delta: Delta) -> None:
        """Tokens follow one another without a gap: a delta that does not is our own mistake and
        ends the request."""
        if delta.offset != len(record.token_ids):
            self._fail(
                record,
                Internal(
                    f"tokens from {delta.offset} on came after {len(record.token_ids)}",
                    stage="detokenizer",
                ),
            )
            return
        if record.events.qsize() >= MAX_UNREAD:
            self._fail(
                record,
                Exhausted("the answer comes faster than its client reads it", stage="gateway"),
            )
            return
        if not record.attempt.is_answering:
            self._begin_answer(record)
        record.extend(delta)
        if delta.finish_reason:
            self._forget(record)
            reason = delta.finish_reason
            count = len(record.token_ids)
            seconds = round(record.end(delta), 3)
            self._log.info(
                "answered",
                request_id=record.id,
                finish_reason=reason,
                tokens=count,
                seconds=seconds,
            )

    def _begin_answer(self, record: Record) -> None:
        record.attempt.is_answering = True
        record.losses_without_token = 0
        record.retries = 0
        record.interruption = None
        record.cancel_timers("patience")
        if record.first_token is None:
            record.first_token = time.monotonic()
            self._count_waiting(-1)
            self._admission.pace.first_token(record.first_token, self._num_waiting)
            record.events.put_nowait(Began(record.prompt_token_ids))

    # Ends

    def _expire(self, record: Record) -> None:
        reason = (
            f"no answer within {record.timeout:g} s: at the deadline the request "
            f"was at the {record.stage}"
        )
        self._fail(record, DeadlineExceeded(reason, stage=record.stage))

    def _fail(self, record: Record, error: ServingError) -> None:
        self._abort(record)
        self._forget(record)
        self._log.warning(
            "failed", request_id=record.id, code=error.code, stage=error.stage, reason=error.message
        )
        record.events.put_nowait(error)

    def _forget(self, record: Record) -> None:
        del self._records[record.id]
        self._unplaced.pop(record.id, None)
        record.cancel_timers()
        if record.first_token is None:
            self._count_waiting(-1)
        if not self._records:
            self.idle.set()
        self._release()

    def _abort(self, record: Record) -> None:
        """Every stage that holds something for the request frees it; the language group tells the
        detokenizer."""
        attempt = record.attempt
        for peer_id in filter(None, (attempt.preprocess, attempt.llm)):
            self.peers.abort(peer_id, Abort(request_id=record.id, attempt=attempt.number))

    def _release(self) -> None:
        """A detokenizer that drains may leave when no answer of ours is to come to it."""
        for peer_id in self.peers.draining("detokenizer"):
            if not any(record.attempt.detokenizer == peer_id for record in self._records.values()):
                self.peers.release(peer_id)
