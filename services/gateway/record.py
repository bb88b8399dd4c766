"""What the gateway knows about each request in flight."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from common.errors import ServingError, Unavailable
from common.events import Received
from common.messages import (
    Abort,
    Converted,
    Delta,
    GatewayInbound,
    HandedOver,
    ItemsLeft,
    Peer,
    Pooled,
    RequestIds,
    Routed,
    Sibling,
    Submit,
    Task,
    Usage,
)
from common.timings import Timings
from common.tracing import ATTEMPT, NO_SPAN, Attributes, Span, Tracing, trace_id_of
from common.wire import Tensor
from services.gateway.deltas import in_order
from services.gateway.generation import (
    Began,
    Conversion,
    GenerationEvent,
    GenerationRequest,
    Piece,
    Result,
)
from services.gateway.parameters import MAX_SEED
from services.gateway.videos import item_of

MAX_EARLY_MESSAGES = 1000


@dataclass(slots=True)
class Attempt:
    """One pass of a request through the stages.

    `preprocess`, `detokenizer` and `llm` are the ids of the members that hold the request. They are
    empty while the request waits for a member of each stage.
    """

    number: int
    num_resumed: int = 0
    """The number of tokens that earlier attempts delivered."""
    preprocess: str = ""
    detokenizer: str = ""
    llm: str = ""
    early: list[Received[GatewayInbound]] = field(default_factory=list)
    """What arrived before Routed, which comes over another connection."""
    is_encoded: bool = False
    """Whether the language group has the prompt and the embeddings of every image."""
    num_items_left: int | None = None
    """How many items the language group does not have yet; None if no item has arrived."""
    is_answering: bool = False
    """Whether a token of this attempt has arrived."""
    alone_at: set[str] = field(default_factory=set)
    """The ids of the members that work on nothing but this request."""
    span: Span = NO_SPAN

    def begin_span(self, tracing: Tracing, parent: Span) -> None:
        """Begin the span of the attempt, once it has a member of each stage."""
        if not parent.traceparent:
            return
        attributes: Attributes = {
            ATTEMPT: self.number,
            "twinlens.preprocess": self.preprocess,
            "twinlens.detokenizer": self.detokenizer,
        }
        self.span = tracing.begin("attempt", parent.traceparent, None, attributes, "producer")

    def end_span(self, error: str = "") -> None:
        """End the span of the attempt, unless it has ended. It has failed if there is an error."""
        self.span.end({"twinlens.llm": self.llm}, error)
        self.span = NO_SPAN

    def keep_early(self, received: Received[GatewayInbound]) -> None:
        """Keep a message until Routed says from which language group the attempt's may come."""
        if len(self.early) < MAX_EARLY_MESSAGES:
            self.early.append(received)

    def may_send(self, peer_id: str, message: GatewayInbound) -> bool:
        """Whether this member holds the attempt, and so may send this message about it."""
        match message:
            case Routed() | HandedOver() | ItemsLeft() | Converted():
                return peer_id == self.preprocess
            case Delta():
                return peer_id == self.detokenizer
            case Pooled():
                return peer_id == self.llm
            case _:
                return peer_id in (self.preprocess, self.detokenizer, self.llm)

    @property
    def needs_preprocess(self) -> bool:
        """Whether the loss of preprocess would lose the attempt.

        Preprocess keeps the images until the language group has their embeddings. The first token
        proves that it has all of them.
        """
        return not (self.is_encoded or self.is_answering)

    def depends_on(self, peer_id: str) -> bool:
        """Return whether the attempt is lost if this member is lost."""
        return peer_id in (self.llm, self.detokenizer) or (
            peer_id == self.preprocess and self.needs_preprocess
        )


@dataclass(frozen=True, slots=True)
class RequestState:
    """Where a request in flight is, for the client that sent it."""

    stage: str
    """The stage that works on it; `gateway` while it waits for a stage to come back."""
    interruption: str
    """Why it was interrupted; empty if it was not, or if it goes on by now."""
    num_retries: int
    """The number of times that it was retried on other members."""
    num_items_left: int
    """The images and videos that the language group does not have yet."""
    num_tokens: int
    """The tokens of its answer so far."""


@dataclass(slots=True, eq=False)
class Choices:
    """What the answers to one request share. Each of them has a record of its own."""

    is_joint: bool = False
    """Whether all records are one attempt, that of the first one. It is so until a language group
    has their prompt. Then each is retried by itself."""
    records: "list[Record]" = field(default_factory=list)
    """By the index of the answer."""
    events: asyncio.Queue[GenerationEvent | ServingError] = field(default_factory=asyncio.Queue)
    """Events that the API server has not taken yet. An error is the last one."""
    deaths: Counter[str] = field(default_factory=Counter)
    """By role: how many members in a row have died while they worked on this request."""
    apart: set[str] = field(default_factory=set)
    """The roles whose members must work on this request apart from the others."""
    began: Began | None = None
    """The begin of the first answer."""
    early: list[GenerationEvent] = field(default_factory=list)
    """Events of other answers that came before the first one began, as after a failover."""
    usages: dict[int, Usage] = field(default_factory=dict)
    """The token counts of the answers that have ended, by index."""

    def put(self, event: GenerationEvent) -> None:
        """Pass an event on to the API server, which gets the begin of the first answer first.

        What that says of the prompt is in the begin of each other answer, too.
        """
        if isinstance(event, Began) and event.choice == 0:
            self.began = event
        elif self.began is None and not isinstance(event, Result | Conversion) and event.choice:
            self.early.append(event)
            return
        for each in (event, *self.early):
            if isinstance(each, Began) and self.began:
                each = replace(
                    each,
                    prompt_token_ids=self.began.prompt_token_ids,
                    prompt_logprobs=self.began.prompt_logprobs,
                )
            self.events.put_nowait(each)
        self.early = []

    @property
    def total_usage(self) -> Usage:
        """The token counts of all answers together, once all have ended. The prompt counts once."""
        num_completed = sum(usage.completion_tokens for usage in self.usages.values())
        return msgspec.structs.replace(self.usages[0], completion_tokens=num_completed)


@dataclass(slots=True, eq=False)
class Record:
    """Everything needed to retry a request on other members after the tokens already delivered.

    A request for several answers has a record for each of them.
    """

    request: GenerationRequest
    id: str
    """The name of the request in the stages. It is unique among all gateways, which the id that
    the client chose need not be."""
    timeout: float
    """Seconds from admission to the deadline."""
    task: Task
    """What the model is asked for, which for a generation may be a label."""
    choices: Choices = field(default_factory=Choices)
    """This answer and the others to the same request."""
    index: int = field(init=False)
    """The index of the answer among them."""
    attempt: Attempt = field(default_factory=lambda: Attempt(0))
    prompt_token_ids: list[int] | None = None
    item_sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width of each image in pixels, once preprocess has read it."""
    token_ids: list[int] = field(default_factory=list)
    """Every output token received so far, from all attempts."""
    admitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    """The time of the first token, on the monotonic clock."""
    avoid: str = ""
    """The language group that the last attempt was lost with."""
    losses: int = 0
    """The number of attempts lost with a member, unless another request was to blame."""
    reported: Attempt | None = None
    """The last attempt that ended because a stage reported the loss of another one. The gateway may
    notice that loss itself a moment later."""
    retries: int = 0
    """The number of retries since the last token because a stage could not reach its peer."""
    interruption: Unavailable | None = None
    """Why the answer was interrupted; None once a token of the new attempt arrives."""
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    """Pending timers by name: deadline, patience and retry."""

    def __post_init__(self) -> None:
        self.index = len(self.choices.records)
        self.choices.records.append(self)

    @property
    def lead(self) -> "Record":
        """The record whose attempt this one is part of: its own, or the first one's."""
        return self.choices.records[0] if self.choices.is_joint else self

    @property
    def joint_records(self) -> "list[Record]":
        """The records whose attempt is this one's."""
        return self.choices.records if self.choices.is_joint else [self]

    @property
    def num_new_tokens(self) -> int:
        """The number of tokens of the current attempt."""
        return len(self.token_ids) - self.attempt.num_resumed

    @property
    def stage(self) -> str:
        """The stage that works on the request, as far as the gateway knows."""
        attempt = self.attempt
        if not attempt.preprocess:
            return "gateway"
        if not attempt.llm:
            return "preprocess"
        if not self.request.images or not attempt.needs_preprocess:
            return "llm"
        return "vision" if self.task == "generate" else "preprocess"

    @property
    def state(self) -> RequestState:
        """Where the request is now."""
        attempt = self.attempt
        left = attempt.num_items_left
        if left is None:
            left = len(self.request.images)
        return RequestState(
            stage=self.stage,
            interruption=self.interruption.message if self.interruption else "",
            num_retries=attempt.number,
            num_items_left=left if attempt.needs_preprocess else 0,
            num_tokens=len(self.token_ids),
        )

    def seconds_left(self, now: float) -> float:
        """Return about how long the answer still takes, at most until the deadline.

        The pace so far counts, if the length is known. Otherwise, what has lasted for some time is
        taken to last for as long again.
        """
        left = now - self.admitted
        most = self.request.stopping.max_tokens
        if self.first_token is not None and most is not None:
            num_tokens = len(self.token_ids)
            left = (most - num_tokens) * (now - self.first_token) / max(1, num_tokens - 1)
        return max(0.0, min(left, self.admitted + self.timeout - now))

    def submit_message(self, detokenizer: Peer, avoid: str) -> Submit:
        """Return the message that starts the current attempt.

        `avoid` is the id of a language group that preprocess should not choose; it may be empty.
        """
        request = self.request
        delivered = Tensor.of(np.array(self.token_ids, np.int64)) if self.token_ids else None
        return Submit(
            request_id=self.id,
            attempt=self.attempt.number,
            prompt_kind=request.prompt_kind,
            prompt=prompt_tensor(request),
            items=tuple(map(item_of, request.images)),
            sampling=request.sampling,
            stopping=request.stopping,
            detokenizer=detokenizer,
            timeout=max(0.0, self.admitted + self.timeout - time.monotonic()),
            return_prompt_token_ids=request.return_prompt_token_ids,
            guide_kind=request.guide_kind,
            guide=Tensor.of_text(request.guide) if request.guide else None,
            output_token_ids=delivered,
            avoid=avoid,
            apart="preprocess" in self.choices.apart,
            apart_in_llm=not self.choices.apart.isdisjoint(("llm", "detokenizer")),
            task=self.task,
            traceparent=self.attempt.span.traceparent,
            guide_whitespace=request.guide_whitespace,
            token_rules=request.token_rules,
            priority=request.priority,
            siblings=tuple(
                Sibling(record.id, record.request.sampling.seed)
                for record in self.joint_records
                if record is not self
            ),
            adapter=request.adapter,
            reads_tool_calls=request.reads_tool_calls,
            chat_options=Tensor.of_bytes(request.chat_options) if request.chat_options else None,
            returns_token_names=request.returns_token_names,
        )

    @property
    def log_ids(self) -> dict[str, str]:
        """The fields that name the request in a log."""
        traced = {"trace_id": trace_id_of(self.request.span.traceparent)}
        return {"request_id": self.id} | (traced if self.request.span is not NO_SPAN else {})

    @property
    def ids(self) -> RequestIds:
        """The fields that name the current attempt in a message."""
        return {"request_id": self.id, "attempt": self.attempt.number}

    def abort_message(self) -> Abort:
        """Return the message that cancels the current attempt."""
        return Abort(**self.ids)

    def add_tokens(self, piece: Piece) -> None:
        """Store new tokens and pass them to the client."""
        self.token_ids += piece.token_ids
        for one in in_order(piece):
            self.choices.put(one)

    def complete(self, timings: Timings) -> dict[str, Any]:
        """Return the stage timings of an answer with those that only the gateway knows."""
        assert self.first_token is not None
        return {
            **timings,
            "time_to_first_token_seconds": self.first_token - self.admitted,
            "total_seconds": time.monotonic() - self.admitted,
        }

    def cancel_timers(self, *names: str) -> None:
        """Cancel the timers with these names, or all timers if no name is passed."""
        for name in names or tuple(self.timers):
            if timer := self.timers.pop(name, None):
                timer.cancel()


def one_by_one(request: GenerationRequest) -> list[GenerationRequest]:
    """Return a request for each of the answers, whose seeds follow each other."""
    if request.n == 1:
        return [request]
    sampling = request.sampling
    samplings = [
        msgspec.structs.replace(sampling, seed=(sampling.seed + index) & MAX_SEED)
        for index in range(request.n)
    ]
    # The prompt is the same for all, so one answer brings what was asked about it.
    samplings[1:] = [msgspec.structs.replace(s, num_prompt_logprobs=None) for s in samplings[1:]]
    return [replace(request, n=1, sampling=each) for each in samplings]


def prompt_tensor(request: GenerationRequest) -> Tensor:
    """Return the prompt as it travels: int64 [n] for token ids, uint8 [bytes] for messages."""
    if request.prompt_kind == "token_ids":
        return Tensor("int64", (len(request.prompt) // 8,), request.prompt)
    return Tensor.of_bytes(request.prompt)
