"""Which tokens of which requests the next step computes. Imports no torch."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from services.llm.block_pool import BlockPool
from services.llm.plan import StepPlan
from services.llm.request import Key, Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [begin, end) of a request, to be computed in one step."""

    request: Request
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """The step computes the last known token, so its logits give the next one."""
        return self.end == self.request.num_tokens


class Scheduler:
    """There is no prefill phase and no decode phase: each request has computed `num_computed_tokens` of its `num_tokens`, and
    each step brings some of them nearer. Chunked prefill, decoding, waiting for an image and resuming after a preemption are
    all the same rule. Running requests go first, in the order in which they came, so that a long prompt waits for decodes
    and not they for it; blocks are taken from the latest comer when there are none left."""

    def __init__(self, pool: BlockPool, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool, self.block_size = pool, block_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        assert self._num_blocks(request.num_prompt_tokens + (request.prompt.stopping.max_tokens or 0)) <= self.pool.num_blocks
        self.waiting.append(request)

    def finish(self, keys: Iterable[Key]) -> None:
        """Frees what these requests hold, wherever they stand."""
        gone = set(keys)
        for request in self.running:
            if request.key in gone:
                self._release(request)
        self.running = [r for r in self.running if r.key not in gone]
        self.waiting = deque(r for r in self.waiting if r.key not in gone)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty where nothing can be computed now."""
        chunks: dict[Key, Chunk] = {}
        for request in sorted(self.running, key=lambda r: self._num_wanted(r) > 1):  # decodes first
            count = min(self._num_wanted(request), self._budget(chunks))
            # One that was preempted for another of this step has no block left and wants to begin anew: not in this step.
            if count > 0 and request.block_table and self._make_room(request, count, chunks):
                chunks[request.key] = chunk_of(request, count)
        for request in list(self.waiting):
            count = min(self._num_wanted(request), self._budget(chunks))
            if count == 0:
                continue  # no budget left, or its first image is not there yet: others may pass
            if len(self.running) == self.max_num_seqs or not self._has_room(request, count):
                break
            self._allocate(request, count)
            self.waiting.remove(request)
            self.running.append(request)
            chunks[request.key] = chunk_of(request, count)
        return list(chunks.values())

    def plan(self, chunks: list[Chunk]) -> StepPlan:
        """What the ranks need to compute these chunks."""
        starts = np.cumsum([0, *(c.end - c.begin for c in chunks)])
        tables = np.zeros((len(chunks), max(len(c.request.block_table) for c in chunks)), np.int64)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.request.block_table)] = chunk.request.block_table
        return StepPlan(
            token_ids=np.concatenate([c.request.tokens(c.begin, c.end) for c in chunks]),
            positions=np.concatenate([c.request.positions_of(c.begin, c.end) for c in chunks], axis=1),
            slot_mapping=np.concatenate([self._slots(c) for c in chunks]),
            query_lens=np.diff(starts),
            context_lens=np.array([c.end for c in chunks], np.int64),
            block_tables=tables,
            embedding_rows=np.concatenate([self._embedding_rows(c) + start for c, start in zip(chunks, starts, strict=False)]),
            sampled_rows=np.array([end - 1 for c, end in zip(chunks, starts[1:], strict=True) if c.samples], np.int64),
        )

    def computed(self, chunks: list[Chunk]) -> None:
        """The step is done: its tokens' keys and values are in the cache."""
        for chunk in chunks:
            chunk.request.num_computed_tokens = chunk.end

    def _budget(self, chunks: dict[Key, Chunk]) -> int:
        return self.max_num_batched_tokens - sum(c.end - c.begin for c in chunks.values())

    def _num_wanted(self, request: Request) -> int:
        return max(0, request.num_computable_tokens - request.num_computed_tokens)

    def _make_room(self, request: Request, count: int, chunks: dict[Key, Chunk]) -> bool:
        """Preempts from the end of the queue until the request's tokens fit. False where it had to go itself."""
        while not self._has_room(request, count):
            victim = self.running.pop()
            self._release(victim)
            victim.num_computed_tokens = 0
            self.waiting.appendleft(victim)
            chunks.pop(victim.key, None)
            self.num_preemptions += 1
            if victim is request:
                return False
        self._allocate(request, count)
        return True

    def _has_room(self, request: Request, count: int) -> bool:
        return self._num_missing_blocks(request, count) <= self.pool.num_free

    def _allocate(self, request: Request, count: int) -> None:
        request.block_table += self.pool.allocate(self._num_missing_blocks(request, count))

    def _num_missing_blocks(self, request: Request, count: int) -> int:
        return max(0, self._num_blocks(request.num_computed_tokens + count) - len(request.block_table))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _release(self, request: Request) -> None:
        self.pool.free(request.block_table)
        request.block_table = []

    def _slots(self, chunk: Chunk) -> np.ndarray:
        index = np.arange(chunk.begin, chunk.end)
        return np.array(chunk.request.block_table, np.int64)[index // self.block_size] * self.block_size + index % self.block_size

    def _embedding_rows(self, chunk: Chunk) -> np.ndarray:
        rows = [np.arange(max(o, chunk.begin), min(o + n, chunk.end)) - chunk.begin for o, n in chunk.request.placeholders]
        return np.concatenate([np.zeros(0, np.int64), *rows])


def chunk_of(request: Request, count: int) -> Chunk:
    return Chunk(request, request.num_computed_tokens, request.num_computed_tokens + count)


def embeddings_of(chunk: Chunk) -> list[object]:
    """The parts of the images' embeddings that fall into the chunk, in row order."""
    parts = []
    for i, (offset, length) in enumerate(chunk.request.placeholders):
        begin, end = max(offset, chunk.begin), min(offset + length, chunk.end)
        if begin < end:
            parts.append(chunk.request.embeddings[i][begin - offset : end - offset])
    return parts
