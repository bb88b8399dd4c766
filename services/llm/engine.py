"""The language group's inner loop: requests in, tokens out. Knows no socket."""

import json
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from common.messages import Prompt, Usage
from services.llm.embedding_budget import EmbeddingBudget
from services.llm.guided_decoding import Guides, Mask
from services.llm.ranks import Execute
from services.llm.request import Key, Request
from services.llm.sampler import Logprobs, Sampler
from services.llm.scheduler import Chunk, Scheduler, embeddings_of

REMEMBERED_ENDS = 20_000
EARLY_SECONDS = 60.0
"""For a prompt to come after its embeddings; it is sent before them on another connection."""

NOT_AWAITED = {"queue_seconds": 0.0, "encode_seconds": 0.0, "cached": True}
"""Of an image whose keys and values were in the prefix cache."""


@dataclass(slots=True)
class Output:
    """What a step gave to one request."""

    request: Request
    offset: int
    token_ids: list[int]
    finish_reason: str = ""
    error: str = ""
    logprobs: Logprobs | None = None


@dataclass(slots=True)
class EarlyEmbeddings:
    """Embeddings that came before their prompt."""

    preprocess_id: str
    arrived: float = field(default_factory=time.monotonic)
    images: dict[int, tuple[torch.Tensor, dict[str, Any]]] = field(default_factory=dict)


class Engine:
    """Prompt, embeddings and abort of a request may come in any order."""

    def __init__(
        self,
        scheduler: Scheduler,
        execute: Execute,
        sampler: Sampler,
        guides: Guides,
        hidden_size: int,
        eos_token_ids: tuple[int, ...],
        budget: EmbeddingBudget | None = None,
    ) -> None:
        """`budget` bounds the embeddings held; by default as many tokens as the KV cache holds,
        twice."""
        self.scheduler = scheduler
        self.execute = execute
        self.sampler = sampler
        self.guides = guides
        self.hidden_size = hidden_size
        self.eos_token_ids = eos_token_ids
        self.budget = budget or EmbeddingBudget(2 * scheduler.max_tokens)
        self.requests: dict[Key, Request] = {}
        self.early: dict[Key, EarlyEmbeddings] = {}
        self._ended: OrderedDict[Key, None] = OrderedDict()

    def add(self, prompt: Prompt, preprocess_id: str = "") -> list[tuple[int, str]]:
        """Takes a request; gives (image, objection) of each image whose embeddings came before. For
        the others `preprocess_id` is told when there is room for all of them: see the budget."""
        request = Request(prompt)
        if request.key in self._ended:
            return []
        self.requests[request.key] = request
        if request.placeholders:
            self.budget.add(request.key, request.num_image_tokens, preprocess_id)
        self.sampler.add(
            request.key,
            prompt.sampling,
            prompt.stopping,
            request.token_ids,
            request.output_token_ids,
            self.eos_token_ids,
        )
        if prompt.grammar:
            self.guides.add(request.key, prompt.grammar.text())
            for token_id in request.output_token_ids:
                self.guides.accept(request.key, token_id)
        self.scheduler.add(request)
        early = self.early.pop(request.key, None)
        if early is None:
            return []
        return [
            (image, self._take_embeddings(request, image, e, t))
            for image, (e, t) in early.images.items()
        ]

    def add_embeddings(
        self,
        key: Key,
        image: int,
        embeddings: torch.Tensor,
        timings: dict[str, Any],
        preprocess_id: str,
    ) -> str | None:
        """Gives "" where they were taken, what is wrong with them, or None where the prompt is not
        there yet."""
        if key in self._ended:
            return ""
        if key not in self.requests:
            self.early.setdefault(key, EarlyEmbeddings(preprocess_id)).images[image] = (
                embeddings,
                timings,
            )
            return None
        return self._take_embeddings(self.requests[key], image, embeddings, timings)

    def _take_embeddings(
        self, request: Request, image: int, embeddings: torch.Tensor, timings: dict[str, Any]
    ) -> str:
        if reason := self._objection(request, image, embeddings):
            return reason
        request.embeddings.setdefault(image, embeddings)
        request.image_timings.setdefault(image, timings)
        return ""

    @property
    def holds_anything(self) -> bool:
        return bool(self.requests or self.early)

    def abort(self, keys: list[Key]) -> list[Request]:
        """Frees everything that is held for these requests, and remembers that they ended: their
        messages may still come. Gives those that have begun to answer: their detokenizers hold
        something, too."""
        return [request for key in keys if (request := self._end(key)) and request.first_token]

    def keys_of(self, peer_id: str) -> list[Key]:
        """What a gateway owns, and the images that a preprocess does."""
        owned = [k for k, r in self.requests.items() if r.prompt.gateway_id == peer_id]
        return owned + [k for k, e in self.early.items() if e.preprocess_id == peer_id]

    def expired_keys(self, now: float) -> list[Key]:
        """What is past its deadline: the gateway has told the client, and its abort may be lost."""
        late = [k for k, r in self.requests.items() if now > r.deadline]
        return late + [k for k, e in self.early.items() if now > e.arrived + EARLY_SECONDS]

    def step(self) -> list[Output] | None:
        """One forward pass; None where nothing can be computed until another message comes."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        now = time.monotonic()
        for chunk in chunks:
            chunk.request.first_scheduled = chunk.request.first_scheduled or now
        embeddings: list[Any] = [part for chunk in chunks for part in embeddings_of(chunk)]
        sampling = [chunk for chunk in chunks if chunk.samples]
        masks = self.guides.begin_masks([chunk.request.key for chunk in sampling])
        logits = self.execute(self.scheduler.plan(chunks), embeddings)
        self.scheduler.computed(chunks)
        return (
            self._sample(sampling, logits, {row: mask.result() for row, mask in masks.items()})
            if sampling
            else []
        )

    def _sample(
        self, chunks: list[Chunk], logits: torch.Tensor, masks: dict[int, Mask]
    ) -> list[Output]:
        requests = [chunk.request for chunk in chunks]
        sampled = self.sampler.sample(
            logits, [r.key for r in requests], [len(r.output_token_ids) for r in requests], masks
        )
        now = time.monotonic()
        outputs = []
        for row, request in enumerate(requests):
            request.first_token = request.first_token or now
            output = Output(request, len(request.output_token_ids), [sampled.token_ids[row]])
            if row in sampled.bad_rows:
                output.token_ids = []
                output.error = "the language model computed no number for this prompt"
                self.scheduler.distrust(request)
            else:
                request.output_token_ids.append(sampled.token_ids[row])
                goes_on = self.guides.accept(request.key, sampled.token_ids[row])
                output.finish_reason = self._finish_reason(request) if goes_on else "stop"
                output.logprobs = sampled.logprobs.get(row)
            if output.error or output.finish_reason:
                self._end(request.key)
            outputs.append(output)
        return outputs

    def _finish_reason(self, request: Request) -> str:
        stopping = request.prompt.stopping
        count = len(request.output_token_ids)
        last = request.output_token_ids[-1]
        if count > stopping.min_tokens and last in stopping.stop_token_ids:
            return "stop"
        if count > stopping.min_tokens and last in self.eos_token_ids and not stopping.ignore_eos:
            return "stop"
        return "length" if count == stopping.max_tokens else ""

    def _objection(self, request: Request, image: int, embeddings: torch.Tensor) -> str:
        if image >= len(request.placeholders):
            return f"image {image} of {len(request.placeholders)}"
        wanted = (request.placeholders[image][1], self.hidden_size)
        if tuple(embeddings.shape) != wanted:
            return f"embeddings of shape {tuple(embeddings.shape)}, {wanted} are wanted"
        # A NaN or an infinity is the least or the greatest: a hundred times quicker than isfinite
        # of every element.
        low, high = torch.aminmax(embeddings)
        return "" if bool(low.isfinite() & high.isfinite()) else "embeddings that are no numbers"

    def _end(self, key: Key) -> Request | None:
        self.early.pop(key, None)
        self.budget.remove(key)
        if request := self.requests.pop(key, None):
            self.scheduler.finish(request)
            self.sampler.remove(key)
            self.guides.remove(key)
        self._ended[key] = None
        if len(self._ended) > REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        return request


def usage_of(request: Request) -> Usage:
    return Usage(
        prompt_tokens=request.num_prompt_tokens,
        image_tokens=request.num_image_tokens,
        cached_tokens=request.num_cached_tokens or 0,
    )


def timings_of(request: Request) -> bytes:
    """UTF-8 JSON of the stages up to the first token: what came with the prompt, each image's, and
    this group's own."""
    assert request.first_scheduled is not None and request.first_token is not None
    timings = json.loads(request.prompt.timings.bytes())
    for image, own in enumerate(timings["images"]):
        own.update(request.image_timings.get(image, NOT_AWAITED))
    timings["queue_seconds"] = request.first_scheduled - request.arrived
    timings["prefill_seconds"] = request.first_token - request.first_scheduled
    return json.dumps(timings).encode()
