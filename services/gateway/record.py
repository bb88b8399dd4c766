"""What the gateway knows of a request under way."""

import asyncio
import json
import time
from dataclasses import dataclass, field

import numpy as np

from common.errors import ServingError, Unavailable
from common.messages import Delta, Item, Peer, Submit
from common.wire import Tensor
from services.gateway.generation import Ended, Event, GenerationRequest, Piece


@dataclass(slots=True)
class Attempt:
    """One way of a request through the stages. `preprocess`, `detokenizer` and `llm` are the ids of
    those who hold it; none holds it while it waits for one of each."""

    number: int
    preprocess: str = ""
    detokenizer: str = ""
    llm: str = ""
    early: list[Delta] = field(default_factory=list)
    """Came before Routed, by another connection."""
    is_encoded: bool = False
    """The language group has the prompt and every image."""
    is_answering: bool = False

    @property
    def needs_preprocess(self) -> bool:
        """It keeps the images until they are taken, which they all are when the first token is
        there."""
        return not (self.is_encoded or self.is_answering)

    def depends_on(self, peer_id: str) -> bool:
        return peer_id in (self.llm, self.detokenizer) or (
            peer_id == self.preprocess and self.needs_preprocess
        )


@dataclass(slots=True, eq=False)
class Record:
    """All that the gateway knows of a request under way: enough to begin it anew anywhere, after
    the tokens the client has."""

    request: GenerationRequest
    id: str
    """Among the stages, which serve several gateways: the client's own may be another's, too."""
    timeout: float
    attempt: Attempt = field(default_factory=lambda: Attempt(0))
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    events: asyncio.Queue[Event | ServingError] = field(default_factory=asyncio.Queue)
    admitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    avoid: str = ""
    """The language group that the last attempt was lost with."""
    losses: int = 0
    """Members that were lost with the request in hand."""
    losses_without_token: int = 0
    """Of them those since the last token."""
    retries: int = 0
    """Since the last token, because one stage could not reach another."""
    interruption: Unavailable | None = None
    """Why there is no answer just now, until the next token."""
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Where the request is, as far as the gateway was told."""
        attempt = self.attempt
        if not attempt.preprocess:
            return "gateway"
        if not attempt.llm:
            return "preprocess"
        return "vision" if self.request.images and attempt.needs_preprocess else "llm"

    def submit(self, detokenizer: Peer, avoid: str) -> Submit:
        request = self.request
        return Submit(
            request_id=self.id,
            attempt=self.attempt.number,
            prompt_kind=request.prompt_kind,
            prompt=prompt_tensor(request),
            items=tuple(Item("image", Tensor.of_bytes(image)) for image in request.images),
            sampling=request.sampling,
            stopping=request.stopping,
            detokenizer=detokenizer,
            timeout=max(0.0, self.admitted + self.timeout - time.monotonic()),
            return_prompt_token_ids=request.return_prompt_token_ids,
            guide_kind=request.guide_kind,
            guide=Tensor.of_text(request.guide) if request.guide else None,
            output_token_ids=Tensor.of(np.array(self.token_ids, np.int64))
            if self.token_ids
            else None,
            avoid=avoid,
        )

    def extend(self, delta: Delta) -> None:
        ids = delta.token_ids.numpy().tolist()
        self.token_ids += ids
        logprobs = json.loads(delta.logprobs.bytes()) if delta.logprobs else []
        self.events.put_nowait(Piece(delta.offset, ids, delta.text.text(), logprobs))

    def end(self, delta: Delta) -> float:
        """Gives the seconds since the admission."""
        assert delta.timings is not None and self.first_token is not None
        total = time.monotonic() - self.admitted
        own = {
            "time_to_first_token_seconds": self.first_token - self.admitted,
            "total_seconds": total,
        }
        self.events.put_nowait(
            Ended(delta.finish_reason, delta.usage, json.loads(delta.timings.bytes()) | own)
        )
        return total

    def cancel_timers(self, *names: str) -> None:
        for name in names or tuple(self.timers):
            if timer := self.timers.pop(name, None):
                timer.cancel()


def prompt_tensor(request: GenerationRequest) -> Tensor:
    if request.prompt_kind == "token_ids":
        return Tensor("int64", (len(request.prompt) // 8,), request.prompt)
    return Tensor.of_bytes(request.prompt)
