"""Requests, schedulers, and a language model of a few lines whose every answer is known
beforehand."""

import zlib
from collections import Counter
from typing import Any

import numpy as np

from common.messages import Peer, Prompt, Sampling, Stopping
from common.wire import Tensor
from services.llm.block_pool import BlockPool
from services.llm.lora_registry import Resident
from services.llm.request import Request
from services.llm.scheduler import Chunk, Scheduler, embeddings_of
from services.llm.step_plan import StepPlan

BLOCK_SIZE = 4
HIDDEN_SIZE = 2
VOCAB_SIZE = 50
PLACEHOLDER = 49

Image = tuple[int, int, int]
"""(offset, length, content): equal contents are equal pixels."""


def create_prompt(
    request_id: str = "r",
    num_tokens: int = 8,
    max_tokens: int = 4,
    images: tuple[Image, ...] = (),
    token_ids: list[int] | None = None,
    rope_delta: int = -2,
    attempt: int = 0,
    gateway_id: str = "gateway",
    sampling: dict[str, Any] | None = None,
    cache_salt: bytes = b"",
    rope_parameter: int = 0,
    adapter: str = "",
    whole: bool = False,
    apart: bool = False,
    **stopping: Any,
) -> Prompt:
    ids = np.array(token_ids or range(1, num_tokens + 1), np.int64)
    positions = np.tile(np.arange(len(ids)), (3, 1))
    for offset, length, _ in images:
        ids[offset : offset + length] = PLACEHOLDER
        positions[1:, offset : offset + length] += 5
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return Prompt(
        request_id=request_id,
        attempt=attempt,
        gateway_id=gateway_id,
        token_ids=Tensor.of(ids),
        positions=Tensor.of(positions),
        rope_delta=rope_delta,
        placeholders=Tensor.of(np.array([i[:2] for i in images], np.int64).reshape(-1, 2)),
        mm_hashes=Tensor.of(np.array([[i[2]] * 32 for i in images], np.uint8).reshape(-1, 32)),
        sampling=Sampling(**greedy | (sampling or {})),
        stopping=Stopping(max_tokens=max_tokens, **stopping),
        detokenizer=Peer("detokenizer", "tcp://127.0.0.1:1"),
        timeout=60.0,
        timings=Tensor.of_text(
            '{"preprocess_seconds": 0.5, "images": [' + ", ".join(["{}"] * len(images)) + "]}"
        ),
        cache_salt=cache_salt,
        rope_parameter=rope_parameter,
        adapter=adapter,
        whole=whole,
        apart=apart,
    )


def create_request(
    *args: Any,
    salt: bytes = b"",
    has_embeddings: bool = True,
    resident: Resident | None = None,
    **kwargs: Any,
) -> Request:
    request = Request(create_prompt(*args, **kwargs, cache_salt=salt), adapter=resident)
    for image in range(len(request.placeholders)) if has_embeddings else ():
        give_embeddings(request, image)
    return request


def give_embeddings(request: Request, image: int) -> None:
    request.embeddings[image] = embeddings(
        content_of(request, image), request.placeholders[image][1]
    )


def content_of(request: Request, image: int) -> int:
    return int(request.prompt.mm_hashes.numpy()[image, 0])


def embeddings(content: int, length: int) -> np.ndarray:
    """Negative, so that they are no token ids."""
    rows = -(1000 * (content + 1) + np.arange(length, dtype=np.float32))
    return np.tile(rows[:, None], (1, HIDDEN_SIZE))


def create_scheduler(
    *requests: Request,
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    prefix_caching: bool = True,
    block_size: int = BLOCK_SIZE,
) -> Scheduler:
    scheduler = Scheduler(
        BlockPool(num_blocks), block_size, max_num_seqs, max_num_batched_tokens, prefix_caching
    )
    for request in requests:
        scheduler.add(request)
    return scheduler


class FakeRunner:
    """Its keys and values are the tokens' inputs and positions, and its next token is a hash of all
    that it finds in the sequence's blocks: a slot that another wrote, or nobody, changes every
    token that follows."""

    hidden_size = HIDDEN_SIZE

    def __init__(self, num_blocks: int = 64, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self.cache = np.full((num_blocks * block_size, 4), -1, np.int64)
        self.plans: list[StepPlan] = []

    def next_tokens(self, plan: StepPlan, embeddings: list[Any]) -> list[int]:
        self.plans.append(plan)
        blocks = self.cache.reshape(-1, self.block_size, 4)
        sources, targets = plan.block_copies.T
        blocks[targets] = blocks[sources]
        inputs = plan.token_ids.copy()
        inputs[plan.item_rows] = np.concatenate(
            [np.zeros(0), *(np.asarray(e)[:, 0] for e in embeddings)]
        )
        self.cache[plan.slot_mapping] = np.concatenate([inputs[None], plan.positions]).T
        seqs = np.searchsorted(plan.query_lens.cumsum() - 1, plan.sampled_rows)
        return [self._next_token(plan, seq) for seq in seqs.tolist()]

    def _next_token(self, plan: StepPlan, seq: int) -> int:
        index = np.arange(plan.context_lens[seq])
        slots = (
            plan.block_tables[seq, index // self.block_size] * self.block_size
            + index % self.block_size
        )
        return next_token(self.cache[slots])


def next_token(history: np.ndarray) -> int:
    """`history` is int64 [num_tokens, 4]: the input and the three positions of each."""
    return zlib.crc32(history.astype(np.int64).tobytes()) % VOCAB_SIZE


def expected_output(request: Request, count: int | None = None) -> list[int]:
    """The answer of a request that nothing disturbs."""
    inputs = request.token_ids.copy()
    positions = request.positions
    for image, (offset, length) in enumerate(request.placeholders):
        inputs[offset : offset + length] = embeddings(content_of(request, image), length)[:, 0]
    history = np.concatenate([inputs[None], positions]).T
    output = []
    for index in range(
        len(history), len(history) + (count or request.prompt.stopping.max_tokens or 0)
    ):
        output.append(next_token(history))
        history = np.concatenate(
            [history, [[output[-1], *[index + request.prompt.rope_delta] * 3]]]
        )
    return output


def run_step(scheduler: Scheduler, runner: FakeRunner) -> list[Chunk]:
    """One step as the engine makes it, with all that must hold before and after it."""
    chunks = scheduler.schedule()
    assert_blocks_are_owned(scheduler)
    if chunks:
        plan = scheduler.plan(chunks)
        assert_plan_is_allowed(scheduler, plan, chunks)
        tokens = runner.next_tokens(
            plan, [part for chunk in chunks for part in embeddings_of(chunk)]
        )
        scheduler.computed(chunks)
        for chunk, token in zip([c for c in chunks if c.samples], tokens, strict=True):
            chunk.request.output_token_ids.append(token)
            if len(chunk.request.output_token_ids) == chunk.request.prompt.stopping.max_tokens:
                scheduler.finish(chunk.request)
        assert_blocks_are_owned(scheduler)
    return chunks


def run(scheduler: Scheduler, runner: FakeRunner, max_steps: int = 1000) -> list[list[Chunk]]:
    """Steps until there is nothing to compute."""
    steps = []
    while chunks := run_step(scheduler, runner):
        steps.append(chunks)
        assert len(steps) < max_steps, "no end"
    return steps


def holders(scheduler: Scheduler) -> Counter[int]:
    return Counter(block for request in scheduler.running for block in request.block_table)


def assert_blocks_are_owned(scheduler: Scheduler) -> None:
    """Each block is free or held, and shared only where all its tokens are computed."""
    held = holders(scheduler)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks - len(held), (
        "a block was lost or has two owners"
    )
    assert not any(map(scheduler.pool.is_free, held)), "a block that is held is free"
    assert not any(request.block_table for request in scheduler.waiting)
    for request in scheduler.running:
        assert len(set(request.block_table)) == len(request.block_table)
        own = request.block_table[request.num_computed_tokens // scheduler.block_size :]
        assert all(held[block] == 1 for block in own), "a block is shared that will be written"


def assert_plan_is_allowed(scheduler: Scheduler, plan: StepPlan, chunks: list[Chunk]) -> None:
    assert 0 < plan.num_tokens <= scheduler.max_num_batched_tokens
    assert len(chunks) <= scheduler.max_num_seqs
    computed = {id(chunk.request) for chunk in chunks}
    assert len(computed) == len(chunks)
    if plan.query_lens.max() > 1 and scheduler.turn.holder is None:
        assert all(id(r) in computed for r in scheduler.running if r.num_wanted == 1), (
            "a prompt holds up a decode"
        )
    assert len(set(plan.slot_mapping.tolist())) == plan.num_tokens, "two tokens for one slot"
    held = holders(scheduler)
    assert all(held[slot // scheduler.block_size] == 1 for slot in plan.slot_mapping.tolist()), (
        "a shared block is written"
    )
