"""The language group's shell: messages to the engine, its outputs to the detokenizers."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from common.events import PeerDown, PeerDraining, PeerUp, Received
from common.logs import get_logger
from common.member import Event, Member
from common.messages import (
    Abort,
    Embeddings,
    Failed,
    ItemReceived,
    ItemRejected,
    Prompt,
    Reserved,
    Start,
    StopFound,
    Tokens,
)
from common.wire import Tensor
from compute.torch_tensors import to_torch
from services.llm.engine import Engine, Output, timings_of, usage_of
from services.llm.load_report import LoadReport
from services.llm.request import Key, objection_to

EXPIRY_SECONDS = 1.0


class Worker:
    def __init__(
        self, member: Member, engine: Engine, drain: Callable[[], None] = lambda: None
    ) -> None:
        """`drain` is called when another rank of the group is to leave: none can without the
        others."""
        self._member = member
        self._engine = engine
        self._drain = drain
        self._log = get_logger()
        self._report = LoadReport(member.links, engine.scheduler)

    def run(self) -> None:
        """Steps while there is something to compute; waits for messages where there is not."""
        idle = True
        next_expiry = 0.0
        while (
            events := self._member.take_events(
                wait=idle, timeout=EXPIRY_SECONDS if self._engine.holds_anything else None
            )
        ) is not None:
            for event in events:
                self._handle(event)
            if (now := time.monotonic()) >= next_expiry:
                self._abort(self._engine.expired_keys(now))
                next_expiry = now + EXPIRY_SECONDS
            self._tell_reserved()
            outputs = self._engine.step()
            for output in outputs or []:
                self._send(output)
            idle = outputs is None
            self._report.tell(at_once=idle)

    def _handle(self, event: Event) -> None:
        match event:
            case Received(peer_id=peer_id, message=message):
                self._take(peer_id, message)
            case PeerDown(peer_id=peer_id, role=role, reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._report.remove(peer_id)
                if role in ("gateway", "preprocess"):
                    self._abort(self._engine.keys_of(peer_id))
                elif role == "detokenizer":
                    self._lose_detokenizer(peer_id, reason)
            case PeerDraining(role="llm"):
                self._drain()
            case PeerUp(peer_id=peer_id, role="preprocess"):
                self._report.add(peer_id)

    def _lose_detokenizer(self, peer_id: str, reason: str) -> None:
        """The gateway may not see what we see of it: its own connection to it may stand."""
        for prompt in [
            r.prompt for r in self._engine.requests.values() if r.prompt.detokenizer.id == peer_id
        ]:
            name: dict[str, Any] = {"request_id": prompt.request_id, "attempt": prompt.attempt}
            text = f"the language group lost the detokenizer: {reason}"
            self._member.links.send(
                prompt.gateway_id,
                Failed(**name, code="Unavailable", message=text, stage="detokenizer"),
            )
            self._engine.abort([(prompt.request_id, prompt.attempt)])

    def _take(self, peer_id: str, message: Any) -> None:
        match message:
            case Prompt() if problem := objection_to(
                message, self._engine.scheduler.max_tokens, self._engine.budget.num_tokens
            ):
                self._log.error("prompt refused", request_id=message.request_id, reason=problem)
                name: dict[str, Any] = {
                    "request_id": message.request_id,
                    "attempt": message.attempt,
                }
                self._member.links.send(
                    message.gateway_id,
                    Failed(**name, code="Internal", message=problem, stage="llm"),
                )
            case Prompt():
                self._member.links.connect(message.detokenizer, "detokenizer")
                for image, reason in self._engine.add(message, peer_id):
                    self._acknowledge(peer_id, message, image, reason)
                self._log.debug(
                    "prompt", request_id=message.request_id, num_tokens=message.token_ids.shape[0]
                )
            case Embeddings():
                key = (message.request_id, message.attempt)
                timings = {
                    "queue_seconds": message.queue_seconds,
                    "encode_seconds": message.encode_seconds,
                    "cached": message.cached,
                }
                objection = self._engine.add_embeddings(
                    key, message.image, to_torch(message.embeddings), timings, message.preprocess_id
                )
                if objection is not None:
                    self._acknowledge(message.preprocess_id, message, message.image, objection)
            case Abort():
                self._abort([(message.request_id, message.attempt)])
            case StopFound():
                self._engine.abort([(message.request_id, message.attempt)])

    def _tell_reserved(self) -> None:
        for (request_id, attempt), preprocess_id in self._engine.budget.take_reserved():
            self._member.links.send(preprocess_id, Reserved(request_id=request_id, attempt=attempt))

    def _acknowledge(self, preprocess_id: str, message: Any, image: int, objection: str) -> None:
        name: dict[str, Any] = {
            "request_id": message.request_id,
            "attempt": message.attempt,
            "image": image,
        }
        answer = ItemRejected(**name, reason=objection) if objection else ItemReceived(**name)
        self._member.links.send(preprocess_id, answer)

    def _abort(self, keys: list[Key]) -> None:
        for request in self._engine.abort(keys):
            request_id, attempt = request.key
            self._member.links.send(
                request.prompt.detokenizer.id, Abort(request_id=request_id, attempt=attempt)
            )

    def _send(self, output: Output) -> None:
        prompt = output.request.prompt
        name: dict[str, Any] = {"request_id": prompt.request_id, "attempt": prompt.attempt}
        send = lambda message: self._member.links.send(prompt.detokenizer.id, message)  # noqa: E731
        request = output.request
        if output.offset == request.num_resumed_tokens:
            send(
                Start(
                    **name,
                    gateway_id=prompt.gateway_id,
                    stopping=prompt.stopping,
                    usage=usage_of(request),
                    timings=Tensor.of_bytes(timings_of(request)),
                    output_token_ids=prompt.output_token_ids,
                )
            )
        if output.error:
            self._log.error("request failed", request_id=prompt.request_id, reason=output.error)
            send(Failed(**name, code="Internal", message=output.error, stage="llm"))
            return
        send(
            Tokens(
                **name,
                offset=output.offset,
                token_ids=Tensor.of(np.array(output.token_ids, np.int64)),
                finish_reason=output.finish_reason,
                **logprobs_of(output),
            )
        )


def logprobs_of(output: Output) -> dict[str, Any]:
    """The fields of Tokens for one token; none where the request asked for none."""
    if (found := output.logprobs) is None:
        return {}
    return {
        "logprobs": Tensor.of(np.array([found.logprob], np.float32)),
        "top_token_ids": Tensor.of(found.top_token_ids[None]),
        "top_logprobs": Tensor.of(found.top_logprobs[None]),
    }
