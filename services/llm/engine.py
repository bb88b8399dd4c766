"""The language group's inner loop: requests in, tokens out. It knows no socket."""

import json
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from common.messages import ItemKey, Prompt, RequestKey, Usage
from services.llm.embedding_budget import EmbeddingBudget
from services.llm.guided_decoding import GuidedDecoding, Mask
from services.llm.ranks import Execute
from services.llm.request import Limits, Request
from services.llm.sampler import Logprobs, Sampler
from services.llm.scheduler import Chunk, Scheduler, embeddings_of

MAX_REMEMBERED_ENDS = 20_000
EARLY_SECONDS = 60.0
"""How long embeddings wait for their prompt, which was sent before them on another connection."""

PREFIX_CACHE_TIMINGS = {"queue_seconds": 0.0, "encode_seconds": 0.0, "cached": True}
"""The timings of an item whose keys and values were in the prefix cache."""


@dataclass(slots=True)
class Output:
    """What one step produced for one request."""

    request: Request
    offset: int
    """The index of the first token in the answer."""
    token_ids: list[int]
    finish_reason: str = ""
    error: str = ""
    logprobs: Logprobs | None = None


@dataclass(slots=True)
class EarlyEmbeddings:
    """Embeddings that arrived before their prompt."""

    preprocess_id: str
    arrived: float = field(default_factory=time.monotonic)
    items: dict[int, tuple[torch.Tensor, dict[str, Any]]] = field(default_factory=dict)
    """By item: its embeddings and its timings."""


class Engine:
    """Owns the requests of the group. Prompt, embeddings and abort may arrive in any order."""

    def __init__(
        self,
        scheduler: Scheduler,
        execute: Execute,
        sampler: Sampler,
        guided_decoding: GuidedDecoding,
        input_width: int,
        eos_token_ids: tuple[int, ...],
        budget: EmbeddingBudget | None = None,
        num_position_components: int = 3,
    ) -> None:
        """`input_width` is the width of embeddings. `budget` bounds the embeddings that are held;
        by default it is twice the tokens of the KV cache."""
        self.scheduler = scheduler
        self.execute = execute
        self.sampler = sampler
        self.guided_decoding = guided_decoding
        self.input_width = input_width
        self.eos_token_ids = eos_token_ids
        self.budget = budget or EmbeddingBudget(2 * scheduler.max_tokens)
        self.requests: dict[RequestKey, Request] = {}
        self.early: dict[RequestKey, EarlyEmbeddings] = {}
        self._num_position_components = num_position_components
        self._ended: OrderedDict[RequestKey, None] = OrderedDict()

    @property
    def limits(self) -> Limits:
        """What a request may have at most."""
        return Limits(
            num_position_components=self._num_position_components,
            max_tokens=self.scheduler.max_tokens,
            max_item_tokens=self.budget.num_tokens,
            max_whole_tokens=self.scheduler.max_num_batched_tokens,
        )

    @property
    def load(self) -> tuple[int, int]:
        """(running requests, waiting requests)."""
        return len(self.scheduler.running), len(self.scheduler.waiting)

    def add(self, prompt: Prompt, preprocess_id: str = "") -> list[tuple[int, str]]:
        """Accept a request within the limits.

        Returns (item, objection) for each item whose embeddings arrived before the prompt. The
        budget notifies `preprocess_id` when there is room for the embeddings of the others.
        """
        request = Request(prompt)
        if request.key in self._ended:
            return []
        self.requests[request.key] = request
        if request.placeholders:
            self.budget.add(request.key, request.num_item_tokens, preprocess_id)
        self.sampler.add(
            request.key,
            prompt.sampling,
            prompt.stopping,
            request.token_ids,
            request.output_token_ids,
            self.eos_token_ids,
        )
        if prompt.grammar:
            self.guided_decoding.add(request.key, prompt.grammar.text())
            for token_id in request.output_token_ids:
                self.guided_decoding.accept(request.key, token_id)
        self.scheduler.add(request)
        early = self.early.pop(request.key, None)
        if early is None:
            return []
        return [
            (item, self._accept_embeddings(request, item, embeddings, timings))
            for item, (embeddings, timings) in early.items.items()
        ]

    def add_embeddings(
        self,
        key: ItemKey,
        embeddings: torch.Tensor,
        timings: dict[str, Any],
        preprocess_id: str,
    ) -> str | None:
        """Accept the embeddings of an item.

        Returns "" if they were accepted, what is wrong with them, or None if the prompt has not
        arrived yet.
        """
        *_, item = key
        request_key = key[:2]
        if request_key in self._ended:
            return ""
        if request_key not in self.requests:
            early = self.early.setdefault(request_key, EarlyEmbeddings(preprocess_id))
            early.items[item] = (embeddings, timings)
            return None
        return self._accept_embeddings(self.requests[request_key], item, embeddings, timings)

    def _accept_embeddings(
        self, request: Request, item: int, embeddings: torch.Tensor, timings: dict[str, Any]
    ) -> str:
        if reason := self._objection(request, item, embeddings):
            return reason
        request.embeddings.setdefault(item, embeddings)
        request.item_timings.setdefault(item, timings)
        return ""

    @property
    def holds_anything(self) -> bool:
        return bool(self.requests or self.early)

    def abort(self, keys: list[RequestKey]) -> list[Request]:
        """Free everything that is held for these requests.

        Their messages may still arrive, so their ends are remembered. Returns the requests that
        have begun to answer: their detokenizers hold something, too.
        """
        return [request for key in keys if (request := self._end(key)) and request.first_token]

    def keys_of(self, peer_id: str) -> list[RequestKey]:
        """Return the requests of a gateway, or those with early embeddings of a preprocess."""
        owned = [k for k, r in self.requests.items() if r.prompt.gateway_id == peer_id]
        return owned + [k for k, e in self.early.items() if e.preprocess_id == peer_id]

    def expired_keys(self, now: float) -> list[RequestKey]:
        """Return what is past its deadline. The gateway has ended it, but its abort may be lost."""
        late = [k for k, r in self.requests.items() if now > r.deadline]
        return late + [k for k, e in self.early.items() if now > e.arrived + EARLY_SECONDS]

    def step(self) -> list[Output] | None:
        """Run one forward pass; None if nothing can be computed until a message arrives."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        now = time.monotonic()
        for chunk in chunks:
            chunk.request.first_scheduled = chunk.request.first_scheduled or now
        embeddings: list[Any] = [part for chunk in chunks for part in embeddings_of(chunk)]
        sampling = [chunk for chunk in chunks if chunk.samples]
        masks = self.guided_decoding.begin_masks([chunk.request.key for chunk in sampling])
        logits = self.execute(self.scheduler.plan(chunks), embeddings)
        self.scheduler.computed(chunks)
        if not sampling:
            return []
        return self._sample(sampling, logits, {row: mask.result() for row, mask in masks.items()})

    def _sample(
        self, chunks: list[Chunk], logits: torch.Tensor, masks: dict[int, Mask]
    ) -> list[Output]:
        requests = [chunk.request for chunk in chunks]
        positions = [len(request.output_token_ids) for request in requests]
        sampled = self.sampler.sample(logits, [r.key for r in requests], positions, masks)
        now = time.monotonic()
        outputs = []
        for row, request in enumerate(requests):
            request.first_token = request.first_token or now
            if row in sampled.bad_rows:
                output = self._failed_output(request)
            else:
                output = self._output(request, sampled.token_ids[row], sampled.logprobs.get(row))
            if output.error or output.finish_reason:
                self._end(request.key)
            outputs.append(output)
        return outputs

    def _failed_output(self, request: Request) -> Output:
        self.scheduler.forget_cached_blocks(request)
        error = "the language model's logits for this prompt are not finite"
        return Output(request, len(request.output_token_ids), [], error=error)

    def _output(self, request: Request, token_id: int, logprobs: Logprobs | None) -> Output:
        """Append a token to the answer of its request."""
        offset = len(request.output_token_ids)
        request.output_token_ids.append(token_id)
        goes_on = self.guided_decoding.accept(request.key, token_id)
        finish_reason = self._finish_reason(request) if goes_on else "stop"
        return Output(request, offset, [token_id], finish_reason, logprobs=logprobs)

    def _finish_reason(self, request: Request) -> str:
        """Return "stop", "length", or "" if the answer goes on."""
        stopping = request.prompt.stopping
        count = len(request.output_token_ids)
        last = request.output_token_ids[-1]
        is_stop = last in stopping.stop_token_ids
        is_eos = last in self.eos_token_ids and not stopping.ignore_eos
        if count > stopping.min_tokens and (is_stop or is_eos):
            return "stop"
        return "length" if count == stopping.max_tokens else ""

    def _objection(self, request: Request, item: int, embeddings: torch.Tensor) -> str:
        """Return why the embeddings of an item cannot be used; "" if they can."""
        if item >= len(request.placeholders):
            return f"item {item} of {len(request.placeholders)}"
        wanted = (request.placeholders[item][1], self.input_width)
        if tuple(embeddings.shape) != wanted:
            return f"embeddings of shape {tuple(embeddings.shape)}, {wanted} are wanted"
        # A NaN or an infinity is the least or the greatest element. Finding these two is a hundred
        # times quicker than isfinite of every element.
        low, high = torch.aminmax(embeddings)
        return "" if bool(low.isfinite() & high.isfinite()) else "embeddings that are not finite"

    def _end(self, key: RequestKey) -> Request | None:
        self.early.pop(key, None)
        self.budget.remove(key)
        if request := self.requests.pop(key, None):
            self.scheduler.finish(request)
            self.sampler.remove(key)
            self.guided_decoding.remove(key)
        self._ended[key] = None
        if len(self._ended) > MAX_REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        return request


def usage_of(request: Request) -> Usage:
    """Return the token counts of a prompt."""
    return Usage(
        prompt_tokens=request.num_prompt_tokens,
        image_tokens=request.num_item_tokens,
        cached_tokens=request.num_cached_tokens or 0,
    )


def timings_of(request: Request) -> bytes:
    """UTF-8 JSON of the stages up to the first token: of the request and of each item."""
    assert request.first_scheduled is not None and request.first_token is not None
    timings = json.loads(request.prompt.timings.bytes())
    for item, own in enumerate(timings["images"]):
        own.update(request.item_timings.get(item, PREFIX_CACHE_TIMINGS))
    timings["queue_seconds"] = request.first_scheduled - request.arrived
    timings["prefill_seconds"] = request.first_token - request.first_scheduled
    return json.dumps(timings).encode()
