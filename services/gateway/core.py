"""The gateway's core: it owns every request from its admission to its only end."""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, assert_never

from common.address import objection_to_peer
from common.errors import (
    DeadlineExceeded,
    Exhausted,
    Internal,
    NotFound,
    ServingError,
    Unavailable,
    from_code,
    shorten,
)
from common.events import Event, PeerDown, PeerDraining, PeerUp, Received, Sender
from common.logs import get_logger
from common.messages import (
    Abort,
    AdapterChanged,
    Adapters,
    Alone,
    Converted,
    Delta,
    Failed,
    GatewayInbound,
    GatewayOutbound,
    HandedOver,
    ItemsLeft,
    LlmLoad,
    Peer,
    Pooled,
    RequestMessage,
    Routed,
    Usage,
)
from common.timings import Timings
from common.tracing import NO_TRACING, Tracing
from services.gateway.adapters import AdaptersOfGroups
from services.gateway.admission import Admission
from services.gateway.conversions import read_converted
from services.gateway.deltas import (
    read_delta,
    read_delta_boxes,
    read_item_sizes,
    read_token_ids,
)
from services.gateway.failover import PATIENCE_SECONDS, RETRY_SECONDS, Failover
from services.gateway.generation import (
    Began,
    Boxes,
    Conversion,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    Result,
)
from services.gateway.metrics import Metrics
from services.gateway.peers import Peers
from services.gateway.pooled import read_pooled
from services.gateway.prompt_logprobs import read_prompt_logprobs
from services.gateway.record import Choices, Record, RequestState, one_by_one
from services.gateway.served_tasks import task_for
from services.gateway.traces import outline

NUM_RECENT = 50
"""The number of latest requests that the times to the first token are kept of."""
MAX_UNREAD_EVENTS = 10_000
"""A request fails if its client has left this many events unread."""


class GatewayCore:
    """Admits requests, sends them through the stages, and gives each request exactly one end.

    Everything runs on one asyncio loop, including `on_event` and `on_members`.
    """

    def __init__(
        self,
        model_name: str,
        max_waiting: int,
        request_timeout: float,
        metrics: Metrics | None = None,
        patience: float = PATIENCE_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self.model_name = model_name
        self.metrics = metrics or Metrics()
        self.peers = Peers()
        self.metrics.watch(self.load, self.peers.kv_cache_usage)
        self.adapters = AdaptersOfGroups(self.peers)
        self.max_model_len = self.peers.max_model_len
        self.on_members = self.peers.on_members
        self.idle = asyncio.Event()
        """Set while no request is in flight."""
        self.idle.set()
        self.is_draining = False
        self.first_token_seconds = deque[float](maxlen=NUM_RECENT)
        """The times to the first token of the latest requests."""
        self.request_timeout = request_timeout
        self._admission = Admission(self.peers, max_waiting)
        self._instance = secrets.token_hex(3)
        self._num_admitted = 0
        self._num_waiting = 0
        """Requests in flight that have no token yet."""
        self._records: dict[str, Record] = {}
        """Requests in flight by their id in the stages."""
        self._failover = Failover(
            self._records, self.peers, self.metrics, self._fail, patience, retry_seconds, tracing
        )
        self._log = get_logger()

    @property
    def links(self) -> Sender[GatewayOutbound]:
        return self.peers.links

    @links.setter
    def links(self, links: Sender[GatewayOutbound]) -> None:
        self.peers.links = links

    # Called by the API servers and by the process

    @contextlib.asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        choices = self._admit(request)
        try:
            async with contextlib.aclosing(self._events(choices)) as events:
                yield events
        finally:
            self._drop(choices)

    def check_model(self, model: str | None) -> str:
        if not model or model == self.model_name:
            return ""
        adapters = self.adapters.paths()
        if model in adapters:
            return model
        served = ", ".join(map(repr, (self.model_name, *adapters)))
        raise NotFound(f"no model {shorten(model)!r} is served here; served: {served}")

    def unready_reason(self) -> str:
        return "the gateway is draining" if self.is_draining else self.peers.unready_reason()

    def drain(self) -> None:
        """Report this gateway as not ready from now on. Requests that still come are answered."""
        self.is_draining = True

    async def stop(self, grace: float) -> None:
        """Refuse new requests, wait `grace` seconds for those in flight, and fail the rest."""
        reason = "the gateway is stopping: try again"
        self._admission.close(reason)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), grace)
        while self._records:
            record = next(iter(self._records.values()))
            self._fail(record, Unavailable(reason, stage="gateway", retry_after=1.0))

    def load(self) -> tuple[int, int]:
        """Return (in_flight, queued): the number of requests with and without a first token."""
        waiting = self._num_waiting
        return max(0, len(self._records) - waiting), waiting

    def expected_delay(self) -> float:
        """Return the seconds until the requests that wait have their first token; 0 if unknown."""
        return self._admission.pace.expected_wait(self._num_waiting)

    def state_of(self, request_id: str) -> RequestState | None:
        """Return where the request with a client's id is; None if none is in flight."""
        for record in self._records.values():
            if record.request.request_id == request_id:
                return record.state
        return None

    # Called with the events of the connections

    def on_event(self, event: Event[GatewayInbound]) -> None:
        """Handle an event so that whatever is wrong with it fails its own request alone."""
        try:
            self._handle(event)
        except Exception:  # noqa: BLE001 - one message must not end the others
            self._log.exception("an event could not be handled")
            if isinstance(event, Received) and isinstance(event.message, RequestMessage):
                self._fail_unreadable(event)

    def _handle(self, event: Event[GatewayInbound]) -> None:
        match event:
            case Received(peer_id=peer_id, message=LlmLoad() as load):
                self.peers.on_llm_load(peer_id, load)
            case Received(peer_id=peer_id, message=Adapters() as report):
                self.adapters.on_report(peer_id, report)
                self._failover.start_waiting()
            case Received(peer_id=peer_id, message=AdapterChanged() as answer):
                self.adapters.on_changed(peer_id, answer)
            case Received():
                self._receive(event)
            case PeerUp():
                self.peers.on_peer_up(event)
                self.adapters.on_peer_up(event)
                self._failover.start_waiting()
            case PeerDown(peer_id=peer_id, reason=reason):
                self.peers.on_peer_down(event)
                self.adapters.on_peer_down(peer_id)
                self._log.warning("peer gone", peer=peer_id, reason=reason)
                self._failover.on_peer_down(event)
            case PeerDraining(peer_id=peer_id):
                self.peers.on_peer_draining(peer_id)
                self._failover.release_detokenizers()

    # Admission

    def _admit(self, request: GenerationRequest) -> Choices:
        timeout = self.request_timeout if request.timeout is None else request.timeout
        self._admission.check(self._num_waiting, timeout, self._seconds_left)
        task = task_for(request, self.peers.tasks)
        self._num_admitted += 1
        record_id = f"{request.request_id}~{self._instance}{self._num_admitted:x}"
        choices = Choices(is_joint=request.n > 1)
        for index, one in enumerate(one_by_one(request)):
            Record(one, f"{record_id}.{index}" if index else record_id, timeout, task, choices)
        self._failover.start_attempt(choices.records[0])
        loop = asyncio.get_running_loop()
        for record in choices.records:
            self._records[record.id] = record
            record.timers["deadline"] = loop.call_later(timeout, self._on_deadline, record)
        self._num_waiting += request.n
        self.idle.clear()
        return choices

    def _seconds_left(self) -> float:
        """Return about how long the request in flight that ends first still takes; 0 for none."""
        now = time.monotonic()
        answering = [r for r in self._records.values() if r.first_token is not None]
        running = answering or self._records.values()
        return min((record.seconds_left(now) for record in running), default=0.0)

    async def _events(self, choices: Choices) -> AsyncGenerator[GenerationEvent, None]:
        while True:
            event = await choices.events.get()
            if isinstance(event, ServingError):
                raise event
            yield event
            if isinstance(event, Ended) and not event.is_last:
                continue
            if isinstance(event, Ended | Result | Conversion):
                return

    # Messages about requests

    def _receive(self, received: Received[GatewayInbound]) -> None:
        """Handle a message if its sender holds the current attempt of the request."""
        message = received.message
        assert isinstance(message, RequestMessage)
        record = self._records.get(message.request_id)
        if record is None or record.attempt.number != message.attempt:
            if isinstance(message, Routed):
                self._abort_late(message)
            elif isinstance(message, Alone):
                self.links.send(received.peer_id, Abort(**message.ids))
        elif record.attempt.may_send(received.peer_id, message):
            self._handle_message(record, received)
        elif received.role == "llm" and not record.attempt.llm:
            record.attempt.keep_early(received)
        else:
            self._log.warning(
                "ignored a message of a member that does not hold the request",
                peer=received.peer_id,
                name=type(message).__name__,
                request_id=record.id,
            )

    def _fail_unreadable(self, received: Received[GatewayInbound]) -> None:
        """Fail the request whose current attempt a message was about that cannot be handled."""
        message = received.message
        assert isinstance(message, RequestMessage)
        record = self._records.get(message.request_id)
        if (
            record
            and record.attempt.number == message.attempt
            and record.attempt.may_send(received.peer_id, message)
        ):
            reason = "a message about the request could not be handled: see the gateway log"
            self._fail(record, Internal(reason, stage=received.role))

    def _handle_message(self, record: Record, received: Received[GatewayInbound]) -> None:
        message = received.message
        assert isinstance(message, RequestMessage)
        match message:
            case Routed():
                self._on_routed(record, message)
            case HandedOver():
                record.attempt.is_encoded = True
            case ItemsLeft(count=count):
                record.attempt.num_items_left = count
            case Alone():
                self._failover.on_alone(record, received.peer_id)
            case Delta() if not record.attempt.llm:
                record.attempt.keep_early(received)
            case Delta():
                self._on_delta(record, message)
            case Pooled():
                self._on_pooled(record, message)
            case Converted():
                self._on_converted(record, message)
            case Failed(item=int()) if record.attempt.is_answering:
                pass  # The prefix cache had this image, so the answer does not need it.
            case Failed():
                self._on_failed(record, message)
            case _:
                assert_never(message)

    def _abort_late(self, routed: Routed) -> None:
        """Abort a request that ended before the gateway knew which language group holds it."""
        if not self._objection_to_group(routed.llm):
            self.links.connect(routed.llm, "llm")
            self.links.send(routed.llm.id, Abort(**routed.ids))

    def _objection_to_group(self, llm: Peer) -> str:
        """Return why a member that preprocess names cannot be a language group."""
        role = self.peers.role_of(llm.id)
        if role not in ("", "llm"):
            return f"{llm.id!r} is a {role} and not a language group"
        return objection_to_peer(llm)

    def _on_routed(self, record: Record, routed: Routed) -> None:
        """Note which language group has the prompt of an attempt, and of those joint with it."""
        if record.attempt.llm or record.lead is not record:
            if record.attempt.llm != routed.llm.id:
                self._log.warning("ignored a second route", request_id=record.id)
            return
        if reason := self._objection_to_group(routed.llm):
            self._fail(record, Internal(reason, stage="preprocess"))
            return
        ids = routed.prompt_token_ids
        try:
            record.prompt_token_ids = None if ids is None else read_token_ids(ids)
            sizes = read_item_sizes(routed.item_sizes, len(record.request.images))
        except ValueError as e:
            self._fail(record, Internal(str(e), stage="preprocess"))
            return
        joint = record.joint_records
        self._failover.on_routed(record)
        self.links.connect(routed.llm, "llm")
        early = []
        for each in joint:
            each.item_sizes = sizes
            each.attempt.llm = routed.llm.id
            early += each.attempt.early
            each.attempt.early = []
        for received in early:
            self._receive(received)

    def _on_failed(self, record: Record, failed: Failed) -> None:
        error = from_code(failed.code, failed.message, failed.stage, failed.item)
        adapter = record.request.adapter
        if not isinstance(error, Unavailable) or failed.item is not None:
            self._fail(record, error)
        elif adapter and adapter not in self.adapters.paths():
            self._fail(record, NotFound(f"the adapter {adapter!r} was unloaded"))
        else:
            self._failover.retry_later(record, error)

    def _on_delta(self, record: Record, delta: Delta) -> None:
        try:
            piece, timings = read_delta(delta, record.index)
            boxes = read_delta_boxes(delta, record.item_sizes)
            prompt_logprobs = read_prompt_logprobs(delta)
        except ValueError as e:
            self._fail(record, Internal(str(e), stage="detokenizer"))
            return
        if error := self._delta_error(record, delta):
            self._fail(record, error)
            return
        if not record.attempt.is_answering:
            self._on_first_token(record, timings, prompt_logprobs, delta.usage)
        record.add_tokens(piece)
        is_end = delta.finish_reason != ""
        self._failover.on_tokens(record, is_end)
        if is_end:
            self._finish(record, self._end_of(record, delta, record.complete(timings), boxes))

    def _end_of(
        self, record: Record, delta: Delta, timings: dict[str, Any], boxes: Boxes | None
    ) -> Ended:
        """Return the end of an answer. The last end of a request has the usage of all answers."""
        choices = record.choices
        choices.usages[record.index] = delta.usage
        is_last = len(choices.usages) == len(choices.records)
        usage = choices.total_usage if is_last else delta.usage
        return Ended(delta.finish_reason, usage, timings, boxes, record.index, is_last)

    def _on_pooled(self, record: Record, pooled: Pooled) -> None:
        """End the request with its result, or with the best label if it asked for a text."""
        try:
            pool, timings = read_pooled(pooled, record.task)
        except ValueError as e:
            self._fail(record, Internal(str(e), stage="llm"))
            return
        self._on_first_token(record, timings)
        self._failover.on_tokens(record, is_end=True)
        usage = Usage(prompt_tokens=pooled.num_prompt_tokens, image_tokens=pooled.num_image_tokens)
        if record.request.task == "generate":
            record.add_tokens(Piece(0, [], pool.best_label, []))
            self._finish(record, Ended("stop", usage, record.complete(timings)))
        else:
            self._finish(record, Result(*pool, usage, record.complete(timings)))

    def _on_converted(self, record: Record, converted: Converted) -> None:
        """End the request with tokens, or with their text."""
        try:
            conversion = read_converted(converted, record.request)
        except ValueError as e:
            self._fail(record, Internal(str(e), stage="preprocess"))
            return
        self._failover.on_routed(record)
        self._forget(record)
        record.choices.put(conversion)
        self._log.info("converted", **record.log_ids, task=record.task)

    def _delta_error(self, record: Record, delta: Delta) -> ServingError | None:
        """Return why the request must end instead of taking this delta, or None."""
        received = len(record.token_ids)
        if delta.offset != received:
            reason = f"expected token {received} of the answer, but got token {delta.offset}"
            return Internal(reason, stage="detokenizer")
        if record.choices.events.qsize() >= MAX_UNREAD_EVENTS:
            reason = "the answer comes faster than its client reads it; read the stream faster"
            return Exhausted(reason, stage="gateway")
        return None

    def _on_first_token(
        self,
        record: Record,
        timings: Timings,
        prompt_logprobs: list[dict[str, Any] | None] | None = None,
        usage: Usage | None = None,
    ) -> None:
        """Note the first token of the attempt, which is not always the first of the request."""
        self._failover.on_first_token(record)
        if record.first_token is None:
            record.first_token = time.monotonic()
            self._num_waiting -= 1
            self._admission.pace.on_served(record.first_token, self._num_waiting)
            self.first_token_seconds.append(record.first_token - record.admitted)
            began = Began(
                record.prompt_token_ids,
                {**timings},
                record.index,
                prompt_logprobs,
                usage or Usage(),
            )
            record.choices.put(began)

    # Ends

    def _finish(self, record: Record, end: Ended | Result) -> None:
        self._forget(record)
        record.choices.put(end)
        self._log.info(
            "answered",
            **record.log_ids,
            finish_reason=end.finish_reason if isinstance(end, Ended) else "",
            tokens=len(record.token_ids),
            seconds=round(end.timings["total_seconds"], 3),
        )

    def _on_deadline(self, record: Record) -> None:
        reason = (
            f"no answer within {record.timeout:g} s: at its deadline the request was in the "
            f"{record.stage} stage"
        )
        self._fail(record, DeadlineExceeded(reason, stage=record.stage))

    def _fail(self, record: Record, error: ServingError) -> None:
        self._drop(record.choices, outline(error))
        record.choices.events.put_nowait(error)

    def _drop(self, choices: Choices, reason: str = "") -> None:
        """Abort all answers to a request that are in flight. With a reason, they have failed."""
        for record in choices.records:
            if record.id in self._records:
                self._failover.abort(record)
                record.attempt.end_span(reason)
                self._forget(record)

    def _forget(self, record: Record) -> None:
        """Drop a request that has ended, and everything that is counted for it."""
        del self._records[record.id]
        if record.first_token is None:
            self._num_waiting -= 1
        if not self._records:
            self.idle.set()
        self._failover.forget(record)
