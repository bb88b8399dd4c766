"""Which tokens of which requests the next step computes. Imports no torch."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from services.llm.block_pool import BlockPool
from services.llm.request import Request
from services.llm.step_plan import StepPlan


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
    """There is no prefill phase and no decode phase: each request has computed
    `num_computed_tokens` of its `num_tokens`, and each step brings some of them nearer. Chunked
    prefill, decoding, reuse of a cached prefix, waiting for an image and resuming after a
    preemption are all the same rule.

        0 ........ shared blocks ........ | ........ own blocks ........ |
        0 .. computed, in the KV cache .. | .. this step .. | .. later .. |
                                 num_computed_tokens                 num_tokens

    A request is admitted when all its known tokens find room, so that only a decode ever asks for
    another block. Blocks are then taken from a request that waits for an image, or else from the
    latest comer: the oldest that can compute always goes on.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        """`max_num_seqs` bounds the requests of a step. Those that wait for an image are not in it
        and keep no other out."""
        self.pool = pool
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def max_tokens(self) -> int:
        """Of one request, prompt and answer together."""
        return self.pool.num_blocks * self.block_size

    def add(self, request: Request) -> None:
        assert (
            self._num_blocks(request.num_prompt_tokens + (request.prompt.stopping.max_tokens or 0))
            <= self.pool.num_blocks
        )
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Frees what the request holds, wherever it stands."""
        if request.block_table:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def distrust(self, request: Request) -> None:
        """What was computed for the request is no number: no other may take it over."""
        self.pool.forget(request.block_table)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty where nothing can be computed now."""
        self._extend_block_tables()
        wanted = [(request, count) for request in self.running if (count := request.num_wanted) > 0]
        # Decodes first: a long prompt waits for them, not they for it.
        wanted.sort(key=lambda w: w[1] > 1)
        chunks = []
        budget = self.max_num_batched_tokens
        for request, count in wanted[: self.max_num_seqs]:
            if count := min(count, budget):
                chunks.append(
                    Chunk(request, request.num_computed_tokens, request.num_computed_tokens + count)
                )
                budget -= count
        return chunks + self._admit(budget, self.max_num_seqs - len(chunks), is_idle=not chunks)

    def plan(self, chunks: list[Chunk]) -> StepPlan:
        """What the ranks need to compute these chunks."""
        requests = [c.request for c in chunks]
        begins = np.array([c.begin for c in chunks], np.int64)
        context_lens = np.array([c.end for c in chunks], np.int64)
        query_lens = context_lens - begins
        ends = query_lens.cumsum()
        starts = ends - query_lens
        seqs = np.repeat(np.arange(len(chunks)), query_lens)
        index = np.arange(ends[-1]) + (begins - starts)[seqs]
        tables = self._block_tables(requests)
        return StepPlan(
            token_ids=np.concatenate([c.request.tokens(c.begin, c.end) for c in chunks]),
            positions=self._positions(
                chunks,
                starts,
                index + np.array([r.prompt.rope_delta for r in requests], np.int64)[seqs],
            ),
            slot_mapping=tables[seqs, index // self.block_size] * self.block_size
            + index % self.block_size,
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=tables,
            embedding_rows=self._embedding_rows(chunks, starts),
            sampled_rows=ends[[c.samples for c in chunks]] - 1,
        )

    def computed(self, chunks: list[Chunk]) -> None:
        """The step is done: its tokens' keys and values are in the cache, and others may find the
        blocks that it filled."""
        for chunk in chunks:
            request = chunk.request
            filled = range(chunk.begin // self.block_size, chunk.end // self.block_size)
            request.num_computed_tokens = chunk.end
            if filled and self.prefix_caching:
                hashes = request.block_hashes(filled.stop, self.block_size)
                for i in filled:
                    self.pool.name(request.block_table[i], hashes[i])

    # Blocks

    def _extend_block_tables(self) -> None:
        """A block for each request whose last token has none, the oldest first, even if others must
        go for it."""
        for request in self.running.copy():
            if request.num_tokens <= len(request.block_table) * self.block_size:
                continue
            while request.block_table and not self.pool.num_free:
                self._preempt(
                    next((r for r in reversed(self.running) if r.num_wanted == 0), self.running[-1])
                )
            if request.block_table:  # it was not preempted itself, now or for one before it
                request.block_table.extend(self.pool.allocate(1))

    def _admit(self, budget: int, num_seqs: int, is_idle: bool) -> list[Chunk]:
        """Chunks of requests that begin or resume, in the order of their arrival; one whose image
        is missing may be passed."""
        chunks: list[Chunk] = []
        for request in self.waiting.copy():
            if budget == 0 or len(chunks) == num_seqs:
                break
            cached = self._cached_blocks(request)
            begin = len(cached) * self.block_size
            end = request.num_computable(begin)
            misses_image = end < request.num_tokens
            if is_idle and not chunks and not misses_image:
                self._take_from_stalled(request, cached)
            if end > begin and self._has_room(request, cached):
                self._start(request, cached)
                chunks.append(Chunk(request, begin, min(end, begin + budget)))
                budget -= chunks[-1].end - begin
            elif not misses_image:
                break
        return chunks

    def _take_from_stalled(self, request: Request, cached: list[int]) -> None:
        """All that run wait for images, and this request need not."""
        while not self._has_room(request, cached):
            self._preempt(self.running[-1])

    def _start(self, request: Request, cached: list[int]) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        self.pool.share(cached)
        request.block_table.extend(
            cached + self.pool.allocate(self._num_blocks(request.num_tokens) - len(cached))
        )
        request.num_computed_tokens = len(cached) * self.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.pool.free(request.block_table)
        del request.block_table[:]

    def _cached_blocks(self, request: Request) -> list[int]:
        """The longest cached prefix. The last token is computed in any case: its logits are
        wanted."""
        if not self.prefix_caching:
            return []
        blocks: list[int] = []
        for name in request.block_hashes(
            (request.num_tokens - 1) // self.block_size, self.block_size
        ):
            if (block := self.pool.find(name)) is None:
                break
            blocks.append(block)
        return blocks

    def _has_room(self, request: Request, cached: list[int]) -> bool:
        num_taken = sum(map(self.pool.is_free, cached))
        return num_taken + self._num_blocks(request.num_tokens) - len(cached) <= self.pool.num_free

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # Parts of a plan

    def _block_tables(self, requests: list[Request]) -> np.ndarray:
        tables = np.zeros((len(requests), max(len(r.block_table) for r in requests)), np.int64)
        for row, request in zip(tables, requests, strict=True):
            row[: len(request.block_table)] = request.block_table
        return tables

    def _positions(
        self, chunks: list[Chunk], starts: np.ndarray, generated: np.ndarray
    ) -> np.ndarray:
        """Those of output tokens follow from their index; the prompt brought its own."""
        positions = np.tile(generated, (3, 1))
        for chunk, start in zip(chunks, starts, strict=True):
            own = chunk.request.positions[:, chunk.begin : chunk.end]
            positions[:, start : start + own.shape[1]] = own
        return positions

    def _embedding_rows(self, chunks: list[Chunk], starts: np.ndarray) -> np.ndarray:
        rows = [np.zeros(0, np.int64)]
        for chunk, start in zip(chunks, starts, strict=True):
            rows += [
                np.arange(begin, end) + start - chunk.begin for _, begin, end in images_in(chunk)
            ]
        return np.concatenate(rows)


def images_in(chunk: Chunk) -> list[tuple[int, int, int]]:
    """(image, begin, end) of the placeholders that fall into the chunk."""
    overlaps = [
        (i, max(o, chunk.begin), min(o + n, chunk.end))
        for i, (o, n) in enumerate(chunk.request.placeholders)
    ]
    return [(i, begin, end) for i, begin, end in overlaps if begin < end]


def embeddings_of(chunk: Chunk) -> list[object]:
    """The parts of the images' embeddings that fall into the chunk, in row order."""
    request = chunk.request
    return [
        request.embeddings[i][begin - request.placeholders[i][0] : end - request.placeholders[i][0]]
        for i, begin, end in images_in(chunk)
    ]
