"""The language group's inner loop: requests in, tokens out. It knows no socket."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.families.family import PromptForm
from common.messages import ItemKey, Prompt, RequestKey, Usage
from common.pace import Pace
from common.timings import ItemTimings, read_timings, write_timings
from common.wire import Tensor
from compute.torch_tensors import to_torch
from services.llm.embedding_budget import EmbeddingBudget
from services.llm.guided_decoding import GuidedDecoding, Mask
from services.llm.lora_registry import LoraRegistry
from services.llm.metrics import LlmMetrics
from services.llm.packing import upload
from services.llm.prompt_logprobs import take_prompt_logits
from services.llm.ranks import Execute
from services.llm.request import Limits, Request
from services.llm.sampler import Logprobs, Sampler
from services.llm.scheduler import Chunk, Scheduler, embeddings_of
from services.llm.siblings import Siblings, prompts_of_siblings

MAX_REMEMBERED_ENDS = 20_000
MAX_EARLY_ABORTS = 20_000
FLOAT_DTYPES = ("float32", "bfloat16", "float16")

PREFIX_CACHE_TIMINGS: ItemTimings = {"queue_seconds": 0.0, "encode_seconds": 0.0, "cached": True}
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
    error_code: str = "Internal"
    """The class of `common.errors` that the error has."""
    logprobs: Logprobs | None = None
    values: np.ndarray | None = None
    """float32 [n]: the result of a request that generates no text."""


class Engine:
    """Owns the requests of the group.

    An abort may arrive before its prompt. Embeddings come after it, because vision encodes an item
    only once the prompt has reserved room for it.
    """

    item_dtypes: tuple[str, ...] = FLOAT_DTYPES
    """The dtypes that the rows of an item may have."""
    pools = False
    """Whether a request ends with one vector, and generates no text."""

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
        *,
        max_model_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        prompt_forms: frozenset[PromptForm] | None = None,
        metrics: LlmMetrics | None = None,
        adapters: LoraRegistry | None = None,
    ) -> None:
        """Create the engine of one group.

        Parameters
        ----------
        input_width
            is the width of embeddings.
        budget
            bounds the embeddings that are held; by default it is twice the tokens of the KV cache.
        max_model_len
            is the context in tokens; by default it is what the KV cache holds.
        dtype
            is the dtype that the model computes in.
        prompt_forms
            are the only forms that prompts have; None if they may have any.
        adapters
            are the LoRA adapters that prompts may name; None if there are none.
        """
        self.adapters = adapters or LoraRegistry()
        self.scheduler = scheduler
        self.execute = execute
        self.sampler = sampler
        self.guided_decoding = guided_decoding
        self.input_width = input_width
        self.eos_token_ids = eos_token_ids
        self.budget = budget or EmbeddingBudget(2 * scheduler.max_tokens)
        self.metrics = metrics or LlmMetrics()
        self.metrics.watch(scheduler, self.budget, self.adapters)
        self.requests: dict[RequestKey, Request] = {}
        self.on_end: Callable[[Request, str], None] = lambda request, error: None
        """Called with each request that ends, and why it failed; empty if it did not."""
        self._num_position_components = num_position_components
        self._max_tokens = min(max_model_len or scheduler.max_tokens, scheduler.max_tokens)
        self._dtype = dtype
        self._prompt_forms = prompt_forms
        self._pace = Pace()
        self._ended: OrderedDict[RequestKey, str] = OrderedDict()
        """The preprocess of each request that ended last."""
        self._compiling: set[RequestKey] = set()
        """The requests that the scheduler does not have yet, because they wait for a grammar."""
        self._siblings = Siblings()
        self._orphans: list[Request] = []
        """Ended requests that waited for the prompt of one that ended before it was computed."""
        self._early_aborts: OrderedDict[tuple[RequestKey, str], None] = OrderedDict()
        """(request, peer that aborted it), for prompts that have not arrived."""

    @property
    def limits(self) -> Limits:
        """What a request may have at most."""
        return Limits(
            num_position_components=self._num_position_components,
            max_tokens=self._max_tokens,
            max_item_tokens=self.budget.num_tokens,
            max_whole_tokens=self.scheduler.max_num_batched_tokens,
            vocab_size=self.guided_decoding.vocab_size,
            pools=self.pools,
            prompt_forms=self._prompt_forms,
        )

    @property
    def load(self) -> tuple[int, int]:
        """(running requests, waiting requests)."""
        num_running = len(self.scheduler.running)
        return num_running, len(self.requests) - num_running

    @property
    def expected_delay(self) -> float:
        """The seconds until the requests that wait have begun; 0 if that is unknown."""
        return self._pace.expected_wait(len(self.scheduler.waiting))

    @property
    def num_free(self) -> int:
        """The number of further requests that a step would have a place for."""
        return max(0, self.scheduler.max_num_seqs - len(self.requests))

    def has_seen(self, key: RequestKey) -> bool:
        """Whether the attempt runs, waits or ended here, so that another prompt of it is none."""
        return key in self.requests or key in self._ended

    def num_requests_of(self, preprocess_id: str) -> int:
        """Return the number of requests of a preprocess that run or wait."""
        return sum(r.preprocess_id == preprocess_id for r in self.requests.values())

    def owner_of(self, key: RequestKey) -> str | None:
        """Return the preprocess of an attempt that runs, waits or ended here; else None."""
        request = self.requests.get(key)
        return request.preprocess_id if request else self._ended.get(key)

    def add(self, prompt: Prompt, preprocess_id: str = "") -> bool:
        """Accept a request within the limits, of a new attempt.

        The budget notifies `preprocess_id` when there is room for the embeddings of its items.
        Returns whether the request goes on: False if it was aborted before. One with a grammar
        waits until `take_refused` finds that compiled.
        """
        adapter = self.adapters.find(prompt.adapter)
        request = Request(prompt, preprocess_id, adapter)
        assert not self.has_seen(request.key)
        siblings = [Request(p, preprocess_id, adapter) for p in prompts_of_siblings(prompt)]
        if self._was_aborted(request):
            self._remember_end(request.key, preprocess_id)
            for sibling in siblings:
                self._remember_end(sibling.key, preprocess_id)
            self._orphans += siblings
            return False
        try:
            self._register(request)
        except Exception:
            self.budget.remove(request.key)
            self._forget(request.key)
            raise
        self.requests[request.key] = request
        if adapter:
            self.metrics.count_adapter(adapter.name)
        if prompt.grammar:
            self._compiling.add(request.key)
        else:
            self.scheduler.add(request)
        if siblings:
            self._hold(request, siblings)
        return True

    def _hold(self, first: Request, siblings: list[Request]) -> None:
        """Hold requests until the prompt that they have in common with the first is computed."""
        wanted = []
        for sibling in siblings:
            if self._was_aborted(sibling):
                self._remember_end(sibling.key, sibling.preprocess_id)
            else:
                wanted.append(sibling)
                self.requests[sibling.key] = sibling
                self._add_to_sampler(sibling)
        self._siblings.add(first, wanted)

    def _begin_siblings(self, first: Request) -> list[Request]:
        """Begin the requests that were held for the prompt of this one, and return them."""
        siblings = self._siblings.release(first)
        if siblings:
            for sibling in siblings:
                self.guided_decoding.copy(first.key, sibling.key)
            self.scheduler.fork(first, siblings)
        return siblings

    def take_orphans(self) -> list[Request]:
        """Return the requests that ended since the last call because another one did, for whose
        prompt they waited."""
        orphans = self._orphans
        self._orphans = []
        return orphans

    def take_refused(self) -> list[tuple[Request, str]]:
        """Begin the requests whose grammars were compiled.

        Returns those whose grammars cannot be followed, which have ended, with the reasons.
        """
        refused = []
        for key, problem in self.guided_decoding.take_compiled():
            request = self.requests[key]
            if problem:
                self._end(key, problem)
                refused.append((request, problem))
            else:
                self._compiling.remove(key)
                self.scheduler.add(request)
        return refused

    @property
    def is_compiling(self) -> bool:
        """Whether a grammar is being compiled, so that `take_refused` should be called soon."""
        return self.guided_decoding.is_compiling

    def _was_aborted(self, request: Request) -> bool:
        """Whether one of its owners aborted the request before it arrived."""
        owners = (request.preprocess_id, request.prompt.gateway_id)
        return any((request.key, owner) in self._early_aborts for owner in owners)

    def _register(self, request: Request) -> None:
        """Hold what the request needs besides its place in the scheduler."""
        key = request.key
        prompt = request.prompt
        if prompt.grammar:
            self.guided_decoding.add(key, prompt.grammar.text(), request.output_token_ids.copy())
        self._add_to_sampler(request)
        if request.placeholders:
            self.budget.add(key, request.num_item_tokens, request.preprocess_id, request.priority)

    def _add_to_sampler(self, request: Request) -> None:
        prompt = request.prompt
        self.sampler.add(
            request.key,
            prompt.sampling,
            prompt.stopping,
            request.token_ids,
            request.output_token_ids,
            self.eos_token_ids,
            prompt.token_rules,
        )

    def add_embeddings(
        self, key: ItemKey, mm_hash: str, embeddings: Tensor, timings: ItemTimings
    ) -> str | None:
        """Accept the embeddings of an item.

        Returns "" if they were accepted or came too late, what is wrong with them, or None if no
        prompt here asked for them.
        """
        *_, item = key
        request_key = key[:2]
        request = self.requests.get(request_key) or self._siblings.recipient(request_key)
        if request is None and request_key in self._ended:
            return ""
        if request is None or request.mm_hash(item) != mm_hash:
            return None
        if item in request.embeddings:
            return ""
        wanted = (request.placeholders[item][1], self.input_width)
        if embeddings.shape != wanted or embeddings.dtype not in self.item_dtypes:
            kind = "uint8" if self.pools else "floating-point"
            return f"embeddings is {embeddings}, {kind} {wanted} is wanted"
        found = to_torch(embeddings)
        if not self._is_finite(found):
            return "embeddings that are not finite"
        request.embeddings[item] = found
        request.item_timings[item] = timings
        return ""

    @property
    def holds_anything(self) -> bool:
        return bool(self.requests)

    def abort(self, keys: list[RequestKey]) -> list[Request]:
        """Free everything that is held for these requests.

        Their messages may still arrive, so their ends are remembered. Returns the requests that
        have begun to answer: their detokenizers hold something, too.
        """
        # The latest first: siblings that are aborted, too, do not wait in vain for the first one.
        ended = [request for key in reversed(keys) if (request := self._end(key))]
        return [request for request in ended if request.first_token]

    def abort_of(self, peer_id: str, key: RequestKey) -> list[Request]:
        """Abort a request, as `abort` does, if this peer owns it.

        If the prompt has not arrived, the abort is remembered for the case that the peer owns it.
        """
        request = self.requests.get(key)
        if request is None:
            if key not in self._ended:
                self._early_aborts[key, peer_id] = None
                if len(self._early_aborts) > MAX_EARLY_ABORTS:
                    self._early_aborts.popitem(last=False)
            return []
        owners = (request.preprocess_id, request.prompt.gateway_id)
        return self.abort([key]) if peer_id in owners else []

    def keys_of(self, peer_id: str) -> list[RequestKey]:
        """Return the requests that are lost with a gateway or a preprocess."""
        return [
            key
            for key, request in self.requests.items()
            if request.prompt.gateway_id == peer_id
            or (request.preprocess_id == peer_id and request.depends_on_preprocess)
        ]

    def expired_keys(self, now: float) -> list[RequestKey]:
        """Return what is past its deadline. The gateway has ended it, but its abort may be lost."""
        return [k for k, r in self.requests.items() if now > r.deadline]

    def step(self) -> list[Output] | None:
        """Run one forward pass; None if nothing can be computed until a message arrives."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        now = time.monotonic()
        self._note_begun(chunks, now)
        embeddings: list[Any] = [part for chunk in chunks for part in embeddings_of(chunk)]
        sampling = [chunk for chunk in chunks if chunk.samples]
        masks = self.guided_decoding.begin_masks([chunk.request.key for chunk in sampling])
        plan = self.scheduler.plan(chunks)
        logits = take_prompt_logits(chunks, self.execute(plan, embeddings))
        self.scheduler.computed(chunks)
        results = {row: mask.result() for row, mask in masks.items()}
        outputs = self._outputs_of(sampling, logits, results) if sampling else []
        self.metrics.observe_step(chunks, len(plan.token_ids), time.monotonic() - now)
        return outputs

    def _note_begun(self, chunks: list[Chunk], now: float) -> None:
        for request in (chunk.request for chunk in chunks):
            if request.first_scheduled is None:
                request.first_scheduled = now
                self._pace.on_served(now, len(self.scheduler.waiting))

    def _outputs_of(
        self, chunks: list[Chunk], logits: torch.Tensor, masks: dict[int, Mask]
    ) -> list[Output]:
        """Sample a token for each request that is computed so far.

        Requests that waited for the prompt of another one get their first tokens by its logits.
        """
        requests = [chunk.request for chunk in chunks]
        rows = list(range(len(requests)))
        for row, chunk in enumerate(chunks):
            siblings = self._begin_siblings(chunk.request)
            requests += siblings
            rows += [row] * len(siblings)
        if len(rows) > len(chunks):
            (places,) = upload([np.array(rows)], logits.device)
            logits = logits[places]
            masks = {row: masks[source] for row, source in enumerate(rows) if source in masks}
        positions = [len(request.output_token_ids) for request in requests]
        sampled = self.sampler.sample(logits, [r.key for r in requests], positions, masks)
        now = time.monotonic()
        outputs = []
        for row, request in enumerate(requests):
            request.first_token = request.first_token or now
            if row in sampled.bad_rows:
                output = self._failed_output(request)
            elif row in sampled.ruled_out_rows:
                output = ruled_out_output(request)
            else:
                output = self._output(request, sampled.token_ids[row], sampled.logprobs.get(row))
            if output.error or output.finish_reason:
                self._end(request.key, output.error)
            outputs.append(output)
        return outputs

    def _failed_output(self, request: Request) -> Output:
        self.scheduler.forget_cached_blocks(request)
        error = "the language model's logits for this prompt are not finite"
        return Output(request, len(request.output_token_ids), [], error=error)

    def _output(self, request: Request, token_id: int, logprobs: Logprobs | None) -> Output:
        """Append a token to the answer of its request."""
        offset = len(request.output_token_ids)
        goes_on = self.guided_decoding.accept(request.key, token_id)
        if failure := self.guided_decoding.failure_of(request.key):
            return Output(request, offset, [], error=failure)
        request.append(token_id)
        finish_reason = self._finish_reason(request) if goes_on else "stop"
        return Output(request, offset, [token_id], finish_reason, logprobs=logprobs)

    def _finish_reason(self, request: Request) -> str:
        """Return "stop", "length", "repetition", or "" if the answer goes on."""
        stopping = request.prompt.stopping
        count = len(request.output_token_ids)
        last = request.output_token_ids[-1]
        is_stop = last in stopping.stop_token_ids
        is_eos = last in self.eos_token_ids and not stopping.ignore_eos
        if count > stopping.min_tokens and (is_stop or is_eos):
            return "stop"
        if count == stopping.max_tokens:
            return "length"
        return "repetition" if request.is_looping and count >= stopping.min_tokens else ""

    def _is_finite(self, embeddings: torch.Tensor) -> bool:
        """Whether all elements are finite, also in the dtype that the model computes in.

        A NaN or an infinity is the least or the greatest element. Finding these two is a hundred
        times quicker than isfinite of every element.
        """
        low, high = (bound.to(self._dtype) for bound in torch.aminmax(embeddings))
        return bool(low.isfinite() & high.isfinite())

    def _end(self, key: RequestKey, error: str = "") -> Request | None:
        request = self.requests.pop(key, None)
        if request:
            if key in self._compiling:
                self._compiling.remove(key)
            elif not request.is_held:
                self.scheduler.finish(request)
            if (items_key := self._siblings.remove(request)) is not None:
                self.budget.remove(items_key)
            self._forget(key)
            self._remember_end(key, request.preprocess_id)
            self.on_end(request, error)
            self._end_orphans(request)
        return request

    def _end_orphans(self, first: Request) -> None:
        """End the requests that wait for the prompt of this one, which is not computed any more."""
        for orphan in self._siblings.orphans_of(first):
            self._end(orphan.key, "the request that computed the prompt ended before")
            self._orphans.append(orphan)

    def _forget(self, key: RequestKey) -> None:
        """Free what is held to compute a request, besides its place in the scheduler."""
        self.sampler.remove(key)
        self.guided_decoding.remove(key)

    def _remember_end(self, key: RequestKey, preprocess_id: str) -> None:
        self._ended[key] = preprocess_id
        if len(self._ended) > MAX_REMEMBERED_ENDS:
            self._ended.popitem(last=False)


def ruled_out_output(request: Request) -> Output:
    """Return the end of a request whose rules leave no token."""
    error = (
        "no token can come next: allowed_token_ids, logit_bias, bad_words, min_tokens and the "
        "form of the answer rule all of them out; ask for less"
    )
    offset = len(request.output_token_ids)
    return Output(request, offset, [], error=error, error_code="InvalidRequest")


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
    timings = read_timings(request.prompt.timings)
    for item, own in enumerate(timings.get("images", [])):
        own.update(request.item_timings.get(item, PREFIX_CACHE_TIMINGS))
    timings["queue_seconds"] = request.first_scheduled - request.arrived
    timings["prefill_seconds"] = request.first_token - request.first_scheduled
    return write_timings(timings)
