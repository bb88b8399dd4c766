"""The work loop of rank 0: messages to the engine, its outputs to the detokenizers."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, assert_never

import numpy as np

from common.apart import Turn
from common.events import PeerDown, PeerDraining, PeerUp, Received
from common.logs import get_logger
from common.member import Event, Member, Posted
from common.messages import (
    Abort,
    AdapterPrepared,
    Alone,
    Cleared,
    DropAdapter,
    Embeddings,
    ExecuteStep,
    Failed,
    ItemIds,
    ItemReceived,
    ItemRejected,
    LlmInbound,
    LoadAdapter,
    Noted,
    Pooled,
    PrepareAdapter,
    Prompt,
    RequestKey,
    RequestMessage,
    Reserved,
    Start,
    StopFound,
    Tokens,
    UnloadAdapter,
    UseAdapter,
    request_ids,
)
from common.progress import UnitTimes
from common.settings import LlmSettings
from common.timings import ItemTimings
from common.wire import Tensor
from services.llm.engine import Engine, Output, timings_of, usage_of
from services.llm.load_report import LoadReport
from services.llm.lora_loading import GroupAdapters
from services.llm.request import Request, objection_to, objection_to_grammar
from services.llm.siblings import sibling_keys
from services.llm.traces import record_request

MAX_REQUESTS_OF_A_PREPROCESS = 4096
"""Requests that run or wait. The gateways admit far fewer at once."""
COMPILED_SECONDS = 0.005
"""How often a loop that is otherwise idle looks for a grammar that is being compiled."""
EXPIRY_SECONDS = 1.0
"""How often deadlines are checked."""


class Worker:
    """Connects the engine to the other services."""

    def __init__(
        self,
        member: Member[LlmInbound],
        engine: Engine,
        drain: Callable[[], None] = lambda: None,
        ranks: frozenset[str] = frozenset(),
        labels: Sequence[str] = (),
        adapters: GroupAdapters | None = None,
    ) -> None:
        """Create the work loop.

        `drain` drains the group. It is called when one of the other `ranks` must leave: no rank
        can leave without the others. `labels` are those of a model that classifies. `adapters`
        loads and unloads LoRA adapters.
        """
        self._member = member
        self._engine = engine
        self._drain = drain
        self._ranks = ranks
        self._labels = Tensor.of_text(json.dumps(labels)) if labels else None
        self._step_times = UnitTimes()
        self._prompt_times = UnitTimes()
        self._visitors: set[str] = set()
        """The peers that connected to this process. It connects to none of them itself."""
        self._log = get_logger()
        self._adapters = adapters or GroupAdapters(engine.adapters, None, LlmSettings(), member)
        self._report = LoadReport(member.links, engine.scheduler, engine.adapters)
        engine.on_end = partial(record_request, member.tracing)
        member.track_load(lambda: engine.load)

    def run(self) -> None:
        """Step while there is something to compute, and wait for messages otherwise."""
        idle = True
        next_expiry = 0.0
        while (events := self._wait_for_events(idle)) is not None:
            for event in events:
                self._handle_alone(event)
            if (now := time.monotonic()) >= next_expiry:
                self._drop_expired(now)
                next_expiry = now + EXPIRY_SECONDS
            for request, reason in self._engine.take_refused():
                self._refuse(request.prompt, reason, code="InvalidRequest")
            self._report_orphans()
            self._report_reserved()
            self._keep_adapters()
            with self._member.progress.unit(self._step_times, len(self._engine.requests)):
                outputs = self._engine.step()
            self._announce_turn()
            for output in outputs or []:
                self._send_output_alone(output)
            idle = outputs is None
            self._report.send_changes(at_once=idle)

    def _keep_adapters(self) -> None:
        """Free adapters that nothing uses any more, and report a change."""
        requests = self._engine.requests.values()
        for name in self._adapters.drop_unused(request.adapter for request in requests):
            self._engine.metrics.forget_adapter(name)
        if self._adapters.changed:
            self._adapters.changed = False
            self._report.send_adapters()

    def _wait_for_events(self, idle: bool) -> list[Event[LlmInbound]] | None:
        self._member.credits = self._engine.num_free
        self._member.expected_delay = self._engine.expected_delay
        timeout = EXPIRY_SECONDS if self._engine.holds_anything else None
        if self._engine.is_compiling:
            timeout = COMPILED_SECONDS
        return self._member.take_events(wait=idle, timeout=timeout)

    def _handle_alone(self, event: Event[LlmInbound]) -> None:
        """Handle an event so that whatever is wrong with it fails its own request alone."""
        try:
            self._handle(event)
        except Exception:  # noqa: BLE001 - one message must not end the others
            self._log.exception("a message could not be handled")
            if isinstance(event, Received) and isinstance(event.message, Prompt):
                self._fail(event.message, "the prompt could not be handled: see the llm log")

    def _fail(self, prompt: Prompt, reason: str) -> None:
        """End a request and report this to its gateway and to its detokenizer."""
        self._abort([prompt.key])
        failed = Failed(**prompt.ids, code="Internal", message=reason, stage="llm")
        self._member.links.send(prompt.gateway_id, failed)

    def _handle(self, event: Event[LlmInbound]) -> None:
        match event:
            case PeerUp(peer_id=peer_id, address=""):
                self._visitors.add(peer_id)
            case PeerDown(peer_id=peer_id):
                self._visitors.discard(peer_id)
        match event:
            case Received(peer_id=peer_id, message=message):
                self._handle_message(peer_id, message)
            case PeerDown(peer_id=peer_id, role=role, reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._report.remove(peer_id)
                if role in ("gateway", "preprocess"):
                    self._abort(self._engine.keys_of(peer_id))
                    self._turn.release_all_of(peer_id)
                elif role == "detokenizer":
                    self._on_detokenizer_down(peer_id, reason)
            case Posted(event=AdapterPrepared() as prepared):
                self._adapters.on_prepared("", prepared)
            case PeerDraining(peer_id=peer_id) if peer_id in self._ranks:
                self._drain()
            case PeerUp(peer_id=peer_id, role="preprocess" | "gateway"):
                self._report.add(peer_id)

    def _on_detokenizer_down(self, peer_id: str, reason: str) -> None:
        """End the requests of a dead detokenizer and report them to their gateways.

        A gateway may not notice the death: its own connection to the detokenizer may stand.
        """
        prompts = [request.prompt for request in self._engine.requests.values()]
        for prompt in [prompt for prompt in prompts if prompt.detokenizer.id == peer_id]:
            text = f"the language group lost the detokenizer: {reason}"
            failed = Failed(**prompt.ids, code="Unavailable", message=text, stage="detokenizer")
            self._member.links.send(prompt.gateway_id, failed)
            self._engine.abort([prompt.key])

    def _handle_message(self, peer_id: str, message: LlmInbound) -> None:
        match message:
            case Prompt():
                self._handle_prompt(peer_id, message)
            case Embeddings():
                self._handle_embeddings(peer_id, message)
            case Abort(key=key):
                self._send_aborts(self._engine.abort_of(peer_id, key))
                self._turn.release(key, peer_id)
            case StopFound(key=key):
                request = self._engine.requests.get(key)
                if request and request.prompt.detokenizer.id == peer_id:
                    self._engine.abort([key])
            case Noted(key=key):
                self._turn.note(key, peer_id)
            case Cleared(key=key):
                self._engine.scheduler.clear(key, peer_id)
            case LoadAdapter():
                self._adapters.load(peer_id, message)
            case UnloadAdapter():
                self._adapters.unload(peer_id, message)
            case AdapterPrepared():
                self._adapters.on_prepared(peer_id, message)
            case ExecuteStep() | PrepareAdapter() | UseAdapter() | DropAdapter():
                # Not among the messages of rank 0, but whoever says that it is a rank may send it.
                self._ignore(peer_id, message, "it has nothing to say to rank 0")
            case _:
                assert_never(message)

    def _ignore(self, peer_id: str, message: object, reason: str) -> None:
        name = type(message).__name__
        request_id = message.request_id if isinstance(message, RequestMessage) else ""
        self._log.warning(
            "ignored a message", peer=peer_id, name=name, request_id=request_id, reason=reason
        )

    def _handle_prompt(self, peer_id: str, prompt: Prompt) -> None:
        if any(map(self._engine.has_seen, [prompt.key, *sibling_keys(prompt)])):
            self._ignore(peer_id, prompt, "the same attempt of the request is or was here")
            return
        problem = objection_to(prompt, self._engine.limits)
        if prompt.adapter and self._engine.adapters.find(prompt.adapter) is None:
            # It was unloaded a moment ago, or another group has it.
            self._refuse(prompt, f"the group has no adapter {prompt.adapter!r}", "Unavailable")
            return
        if self._engine.num_requests_of(peer_id) >= MAX_REQUESTS_OF_A_PREPROCESS:
            problem = f"it is beyond the {MAX_REQUESTS_OF_A_PREPROCESS} requests of one preprocess"
        if not self._engine.pools and prompt.detokenizer.id in self._visitors:
            problem = f"{prompt.detokenizer.id!r} is not a detokenizer"
        if problem:
            self._refuse(prompt, problem)
            return
        if prompt.grammar and (problem := objection_to_grammar(prompt.grammar)):
            self._refuse(prompt, problem, code="InvalidRequest")
            return
        if not self._engine.pools:
            self._member.links.connect(prompt.detokenizer, "detokenizer")
        num_tokens = prompt.token_ids.shape[0]
        with self._prompt_unit(prompt):
            self._engine.add(prompt, peer_id)
        self._log.debug("prompt", request_id=prompt.request_id, num_tokens=num_tokens)

    def _refuse(self, prompt: Prompt, reason: str, code: str = "Internal") -> None:
        """Report to its gateway that a prompt is not computed."""
        self._log.error("prompt refused", request_id=prompt.request_id, reason=reason)
        failed = Failed(**prompt.ids, code=code, message=reason, stage="llm")
        self._member.links.send(prompt.gateway_id, failed)

    def _prompt_unit(self, prompt: Prompt) -> AbstractContextManager[None]:
        """Return the unit of work that the acceptance of a prompt is."""
        resumed = prompt.output_token_ids
        num_tokens = prompt.token_ids.shape[0] + (resumed.shape[0] if resumed else 0)
        return self._member.progress.unit(self._prompt_times, num_tokens)

    def _handle_embeddings(self, peer_id: str, message: Embeddings) -> None:
        """Pass the embeddings of an item to the engine, and report the outcome to its owner."""
        timings: ItemTimings = {
            "queue_seconds": message.queue_seconds,
            "encode_seconds": message.encode_seconds,
            "cached": message.cached,
            "replica": "" if self._engine.pools else peer_id,
        }
        objection = self._engine.add_embeddings(
            message.item_key, message.mm_hash, message.embeddings, timings
        )
        owner = self._engine.owner_of(message.key)
        if objection is None or owner is None:
            self._ignore(message.preprocess_id, message, "no prompt here asked for it")
        else:
            self._acknowledge(owner, message.item_ids, objection)

    def _report_orphans(self) -> None:
        """Have gateways retry the requests that waited for the prompt of one that has ended."""
        for request in self._engine.take_orphans():
            prompt = request.prompt
            text = "the language group ended the request that computed the prompt"
            failed = Failed(**prompt.ids, code="Unavailable", message=text, stage="llm")
            self._member.links.send(prompt.gateway_id, failed)

    def _report_reserved(self) -> None:
        """Report the requests for whose embeddings there is room now."""
        for key, preprocess_id in self._engine.budget.take_reserved():
            self._member.links.send(preprocess_id, Reserved(**request_ids(key)))

    def _acknowledge(self, preprocess_id: str, ids: ItemIds, objection: str) -> None:
        answer = ItemRejected(**ids, reason=objection) if objection else ItemReceived(**ids)
        self._member.links.send(preprocess_id, answer)

    def _drop_expired(self, now: float) -> None:
        expired = self._engine.expired_keys(now)
        self._abort(expired)
        for key in expired:
            self._turn.release_expired(key)

    def _announce_turn(self) -> None:
        """Report a request that will have the steps to itself."""
        if announcement := self._turn.announcement():
            gateway_id, key = announcement
            self._member.links.send(gateway_id, Alone(**request_ids(key)))

    @property
    def _turn(self) -> Turn:
        return self._engine.scheduler.turn

    def _abort(self, keys: list[RequestKey]) -> None:
        self._send_aborts(self._engine.abort(keys))

    def _send_aborts(self, begun: list[Request]) -> None:
        """Have detokenizers forget the answers that have begun."""
        for request in begun:
            prompt = request.prompt
            self._member.links.send(prompt.detokenizer.id, Abort(**prompt.ids))

    def _send_output_alone(self, output: Output) -> None:
        """Send an output so that whatever is wrong with it fails its own request alone."""
        try:
            self._send_output(output)
        except Exception:  # noqa: BLE001 - one answer must not end the others
            self._log.exception("an output could not be sent")
            self._fail(output.request.prompt, "the answer could not be sent: see the llm log")

    def _send_output(self, output: Output) -> None:
        prompt = output.request.prompt
        if self._engine.pools:
            self._send_pooled(output)
            return
        detokenizer_id = prompt.detokenizer.id
        if output.offset == output.request.num_resumed_tokens:
            self._member.links.send(detokenizer_id, start_of(output))
        if output.error:
            # A gateway logs what it refuses; only faults of this group need a line here.
            log = self._log.error if output.error_code == "Internal" else self._log.debug
            log("request failed", request_id=prompt.request_id, reason=output.error)
            failed = Failed(**prompt.ids, code=output.error_code, message=output.error, stage="llm")
            self._member.links.send(detokenizer_id, failed)
            return
        tokens = Tokens(
            **prompt.ids,
            offset=output.offset,
            token_ids=Tensor.of(np.array(output.token_ids, np.int64)),
            finish_reason=output.finish_reason,
            **logprobs_of(output),
        )
        self._member.links.send(detokenizer_id, tokens)

    def _send_pooled(self, output: Output) -> None:
        request = output.request
        prompt = request.prompt
        if output.error:
            self._fail(prompt, output.error)
            return
        assert output.values is not None
        pooled = Pooled(
            **prompt.ids,
            values=Tensor.of(output.values),
            labels=self._labels,
            num_prompt_tokens=request.num_prompt_tokens,
            num_image_tokens=request.num_item_tokens,
            timings=Tensor.of_bytes(timings_of(request)),
        )
        self._member.links.send(prompt.gateway_id, pooled)


def start_of(output: Output) -> Start:
    """Return the message that begins the answer of an output's request."""
    request = output.request
    prompt = request.prompt
    return Start(
        **prompt.ids,
        gateway_id=prompt.gateway_id,
        stopping=prompt.stopping,
        usage=usage_of(request),
        timings=Tensor.of_bytes(timings_of(request)),
        output_token_ids=prompt.output_token_ids,
        timeout=max(0.0, request.deadline - time.monotonic()),
        traceparent=prompt.traceparent,
        reads_tool_calls=prompt.reads_tool_calls,
        **prompt_logprobs_of(request),
    )


def prompt_logprobs_of(request: Request) -> dict[str, Any]:
    """Return the fields of Start about the tokens of a prompt; none if nobody asked for them."""
    scores = request.prompt_scores
    if scores is None or not scores.is_complete:
        return {}
    return {"prompt_token_ids": request.prompt.token_ids} | scores.tensors()


def logprobs_of(output: Output) -> dict[str, Any]:
    """Return the log-probability fields of Tokens; none if the request asked for none."""
    if (found := output.logprobs) is None:
        return {}
    return {
        "logprobs": Tensor.of(np.array([found.logprob], np.float32)),
        "top_token_ids": Tensor.of(found.top_token_ids[None]),
        "top_logprobs": Tensor.of(found.top_logprobs[None]),
    }
