"""Which tokens of which requests the next step computes. Imports no torch."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from common.apart import Turn
from common.messages import RequestKey
from services.llm.block_pool import BlockPool
from services.llm.request import Request
from services.llm.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [begin, end) of a request, computed in one step."""

    request: Request
    begin: int
    end: int

    @property
    def has_prompt(self) -> bool:
        """Whether some of the tokens are of the prompt."""
        return self.begin < self.request.num_prompt_tokens

    @property
    def samples(self) -> bool:
        """Whether the step computes the last known token, so that its logits give the next one."""
        return self.end == self.request.num_tokens

    @property
    def scored(self) -> range:
        """The positions whose logits tell the log-probability of the next token of the prompt."""
        scores = self.request.prompt_scores
        if scores is None or scores.is_complete:
            return range(0)
        assert self.begin <= scores.num_done
        return range(scores.num_done, min(self.end, len(scores.logprobs)))


MAX_SCORED_ROWS = 64
"""The most rows of prompts whose logits are computed in a step. A row of a large vocabulary takes
600 KB, and as much again for its log-probabilities."""


class Scheduler:
    """There is no prefill phase and no decode phase.

    Each request has computed `num_computed_tokens` of its `num_tokens`, and each step computes some
    more. Chunked prefill, decoding, reuse of a cached prefix, waiting for an item and resuming
    after a preemption all follow from this rule.

        0 ........ shared blocks ........ | ........ own blocks ........ |
        0 .. computed, in the KV cache .. | .. this step .. | .. later .. |
                                 num_computed_tokens                 num_tokens

    A request is admitted if all its known tokens find room, so that only a decode asks for another
    block. Such a block is taken from a request that waits for an item, or else from the latest
    arrival. The oldest request that can compute always goes on.

    All this holds among requests of equal priority. Those with lower values are admitted first, and
    lose their blocks last. A request can wait for as long as more urgent ones come.

    A request that is apart takes its turn once all its items are there and it has room. Then it has
    the steps to itself, until the gateway has cleared or ended it.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        """`max_num_seqs` bounds the requests of a step. Requests that wait for an item do not
        count."""
        self.pool = pool
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        """The most urgent requests first."""
        self.running: list[Request] = []
        self.turn = Turn()
        self._block_copies: list[tuple[int, int]] = []
        """The copies of blocks that the next step makes. No step changes the blocks before."""
        self._num_scored_rows = 0
        """The rows of this step whose logits are computed for the sake of the prompt."""
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        """The prompt tokens that were looked up in the prefix cache."""
        self.num_hit_tokens = 0
        """The prompt tokens that were found in the prefix cache."""

    @property
    def max_tokens(self) -> int:
        """The tokens that one request may have, prompt and answer together."""
        return self.pool.num_blocks * self.block_size

    def add(self, request: Request) -> None:
        """Queue a request that fits into the KV cache."""
        num_tokens = request.num_prompt_tokens + (request.prompt.stopping.max_tokens or 0)
        assert num_tokens <= self.max_tokens
        place = len(self.waiting)
        while place and self.waiting[place - 1].priority > request.priority:
            place -= 1
        self.waiting.insert(place, request)

    def fork(self, first: Request, others: list[Request]) -> None:
        """Begin requests with the prompt of one whose prompt is computed, and no more.

        They hold its full blocks, too. The next step copies its last block, if that is not full,
        for each of them. One without room for the copy waits, as after a preemption.
        """
        assert first.num_computed_tokens == first.num_prompt_tokens
        num_full, num_left = divmod(first.num_prompt_tokens, self.block_size)
        full = list(first.block_table[:num_full])
        num_new = min(1, num_left)
        waiting = []
        for request in others:
            request.is_apart = False
            if num_new > self.pool.num_free:
                waiting.append(request)
                continue
            self.pool.share_held(full)
            new = self.pool.allocate(num_new)
            self._block_copies += [(first.block_table[num_full], block) for block in new]
            request.block_table.extend(full + new)
            request.num_computed_tokens = first.num_computed_tokens
            self.running.append(request)
        for request in reversed(waiting):
            self._put_back(request)

    def finish(self, request: Request) -> None:
        """Free what the request holds, whether it runs or waits."""
        if request.block_table:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def forget_cached_blocks(self, request: Request) -> None:
        """Keep others from reusing what was computed for this request: it is not finite."""
        self.pool.forget(request.block_table)

    def schedule(self) -> list[Chunk]:
        """Return the chunks of the next step; empty if nothing can be computed now."""
        self._extend_block_tables()
        self._num_scored_rows = 0
        if self.turn.holder is None:
            self._begin_turn()
        if self.turn.holder is not None:
            return self._schedule_alone()
        wanted = [(request, count) for request in self.running if (count := request.num_wanted) > 0]
        # Decodes first: a long prompt waits for them, not they for it.
        wanted.sort(key=lambda w: (w[1] > 1, w[0].priority))
        chunks = []
        budget = self.max_num_batched_tokens
        for request, count in wanted[: self.max_num_seqs]:
            begin = request.num_computed_tokens
            end = self._scorable(request, begin + min(count, budget))
            if end > begin:
                chunks.append(Chunk(request, begin, end))
                budget -= end - begin
        return chunks + self._admit(budget, self.max_num_seqs - len(chunks), is_idle=not chunks)

    def _begin_turn(self) -> None:
        """Give the next turn to the first request that is apart and can be computed to its end."""
        for request in [request for request in self.waiting if request.is_apart]:
            if request.num_computable(0) < request.num_tokens:
                continue  # it does not hold up others while it waits for an item
            cached = self._cached_blocks(request)
            if not any(other.num_wanted for other in self.running):
                self._preempt_stalled(request, cached)
            if self._has_room(request, cached):
                self.turn.take(request.key, request.prompt.gateway_id)
            return

    def _schedule_alone(self) -> list[Chunk]:
        """Return the chunk of the request whose turn it is; empty if the gateway must answer first.

        The turn may outlast its request, until the gateway has seen the end.
        """
        if not self.turn.is_noted:
            return []
        budget = self.max_num_batched_tokens
        for request in self.running:
            if request.key == self.turn.holder:
                begin = request.num_computed_tokens
                end = begin + min(request.num_wanted, budget)
                return [Chunk(request, begin, self._scorable(request, end))]
        for request in self.waiting:
            if request.key == self.turn.holder:
                self._start(request, self._cached_blocks(request))
                begin = request.num_computed_tokens
                end = min(request.num_tokens, begin + budget)
                return [Chunk(request, begin, self._scorable(request, end))]
        return []

    def clear(self, key: RequestKey, gateway_id: str) -> None:
        """End the turn of a request. If it goes on, it does so with the others."""
        if self.turn.release(key, gateway_id):
            for request in self.running:
                request.is_apart &= request.key != key

    def plan(self, chunks: list[Chunk]) -> StepPlan:
        """Return what the ranks need to compute these chunks."""
        requests = [chunk.request for chunk in chunks]
        begins = np.array([chunk.begin for chunk in chunks], np.int64)
        context_lens = np.array([chunk.end for chunk in chunks], np.int64)
        query_lens = context_lens - begins
        ends = query_lens.cumsum()
        starts = ends - query_lens
        seqs = np.repeat(np.arange(len(chunks)), query_lens)
        # For each row of the batch, the index of its token in its sequence.
        index = np.arange(ends[-1]) + (begins - starts)[seqs]
        deltas = np.array([request.prompt.rope_delta for request in requests], np.int64)
        tables = self._block_tables(requests)
        blocks = tables[seqs, index // self.block_size]
        token_ids = np.concatenate([c.request.tokens(c.begin, c.end) for c in chunks])
        # Decodes have nothing of their prompts to copy.
        prefills = [
            (chunk, start)
            for chunk, start in zip(chunks, starts.tolist(), strict=True)
            if chunk.has_prompt
        ]
        item_rows = self._item_rows(prefills)
        token_ids[item_rows] = 0  # placeholders may lie outside the vocabulary
        copies = np.array(self._block_copies, np.int64).reshape(-1, 2)
        self._block_copies = []
        return StepPlan(
            token_ids=token_ids,
            positions=self._positions(prefills, index + deltas[seqs], len(requests[0].positions)),
            slot_mapping=blocks * self.block_size + index % self.block_size,
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=tables,
            item_rows=item_rows,
            sampled_rows=self._sampled_rows(chunks, starts),
            rope_parameters=np.array([r.prompt.rope_parameter for r in requests], np.int64),
            adapters=np.array([r.adapter.number if r.adapter else 0 for r in requests], np.int64),
            block_copies=copies,
        )

    def computed(self, chunks: list[Chunk]) -> None:
        """Record a finished step. Other requests may reuse the blocks that it filled."""
        for chunk in chunks:
            request = chunk.request
            filled = range(chunk.begin // self.block_size, chunk.end // self.block_size)
            request.num_computed_tokens = chunk.end
            if filled and self._uses_prefix_cache(request):
                hashes = request.block_hashes(filled.stop, self.block_size)
                for i in filled:
                    self.pool.name(request.block_table[i], hashes[i])

    # Blocks

    def _extend_block_tables(self) -> None:
        """Give a block to each request whose last token has none, oldest first.

        If no block is free, another request is preempted.
        """
        for request in self.running.copy():
            if request.num_tokens <= len(request.block_table) * self.block_size:
                continue
            while request.block_table and not self.pool.num_free:
                self._preempt(self._victim())
            # It has no block table if it was preempted itself.
            if request.block_table:
                request.block_table.extend(self.pool.allocate(1))

    def _victim(self) -> Request:
        """Return the request to preempt: the latest that waits for an item, else the latest.

        It is one of the least urgent. The request that has the steps to itself goes last, because
        no other one frees room then.
        """
        holder = self.turn.holder
        others = [request for request in self.running if request.key != holder] or self.running
        highest = max(request.priority for request in others)
        others = [request for request in others if request.priority == highest]
        waits = (request for request in reversed(others) if request.num_wanted == 0)
        return next(waits, others[-1])

    def _admit(self, budget: int, num_seqs: int, is_idle: bool) -> list[Chunk]:
        """Return the chunks of requests that begin or resume, in the order of their arrival.

        A request that misses an item does not hold up those behind it.
        """
        chunks: list[Chunk] = []
        for request in self.waiting.copy():
            if budget == 0 or len(chunks) == num_seqs:
                break
            cached = self._cached_blocks(request)
            begin = len(cached) * self.block_size
            end = request.num_computable(begin)
            misses_item = end < request.num_tokens
            if request.is_apart:
                if misses_item:
                    continue
                break  # it begins once it has room, before those behind it
            if is_idle and not chunks and not misses_item:
                self._preempt_stalled(request, cached)
            if self._can_start(request, begin, end, budget) and self._has_room(request, cached):
                self._start(request, cached)
                end = self._scorable(request, min(end, begin + budget))
                chunks.append(Chunk(request, begin, end))
                budget -= end - begin
            elif not misses_item:
                break
        return chunks

    def _can_start(self, request: Request, begin: int, end: int, budget: int) -> bool:
        """Whether [begin, end) can be computed now, or a part of it unless it must be whole."""
        if request.prompt.whole:
            return end == request.num_tokens and end - begin <= budget
        if request.needs_scores and self._num_scored_rows == MAX_SCORED_ROWS:
            return False
        return end > begin

    def _scorable(self, request: Request, end: int) -> int:
        """Return how far a request can be computed in this step, at most to `end`.

        That depends on the room for the logits of its prompt, of which this takes some.
        """
        scores = request.prompt_scores
        if scores is None or scores.is_complete:
            return end
        end = min(end, scores.num_done + MAX_SCORED_ROWS - self._num_scored_rows)
        self._num_scored_rows += max(0, end - scores.num_done)
        return end

    def _preempt_stalled(self, request: Request, cached: list[int]) -> None:
        """Make room for a request that can compute, while all that run wait for items."""
        while not self._has_room(request, cached):
            self._preempt(self._victim())

    def _start(self, request: Request, cached: list[int]) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        self.pool.share(cached)
        num_new = self._num_blocks(request.num_tokens) - len(cached)
        request.block_table.extend(cached + self.pool.allocate(num_new))
        request.num_computed_tokens = len(cached) * self.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            if self._uses_prefix_cache(request):
                self.num_queried_tokens += request.num_tokens
                self.num_hit_tokens += request.num_cached_tokens

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        self._put_back(request)
        self.num_preemptions += 1

    def _put_back(self, request: Request) -> None:
        """Queue a request before all that are as urgent."""
        place = 0
        while place < len(self.waiting) and self.waiting[place].priority < request.priority:
            place += 1
        self.waiting.insert(place, request)

    def _release(self, request: Request) -> None:
        self.pool.free(request.block_table)
        del request.block_table[:]

    def _uses_prefix_cache(self, request: Request) -> bool:
        return self.prefix_caching and not request.prompt.whole

    def _cached_blocks(self, request: Request) -> list[int]:
        """Return the blocks of the longest cached prefix.

        The last token is always computed, because its logits are wanted, and so is the whole prompt
        if those of all its tokens are.
        """
        if request.needs_scores or not self._uses_prefix_cache(request):
            return []
        blocks: list[int] = []
        num_full = (request.num_tokens - 1) // self.block_size
        for name in request.block_hashes(num_full, self.block_size):
            if (block := self.pool.find(name)) is None:
                break
            blocks.append(block)
        return blocks

    def _has_room(self, request: Request, cached: list[int]) -> bool:
        num_taken = sum(map(self.pool.is_free, cached))
        num_new = self._num_blocks(request.num_tokens) - len(cached)
        return num_taken + num_new <= self.pool.num_free

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # Parts of a plan

    def _sampled_rows(self, chunks: list[Chunk], starts: np.ndarray) -> np.ndarray:
        """Return the rows whose logits are wanted: those that tell about a prompt, and the last one
        of each request that is computed so far."""
        rows: list[int] = []
        for chunk, start in zip(chunks, starts.tolist(), strict=True):
            offset = start - chunk.begin
            rows += [position + offset for position in chunk.scored]
            if chunk.samples:
                rows.append(chunk.end - 1 + offset)
        return np.array(rows, np.int64)

    def _block_tables(self, requests: list[Request]) -> np.ndarray:
        tables = np.zeros((len(requests), max(len(r.block_table) for r in requests)), np.int64)
        for row, request in zip(tables, requests, strict=True):
            row[: len(request.block_table)] = request.block_table
        return tables

    def _positions(
        self, prefills: list[tuple[Chunk, int]], generated: np.ndarray, num_components: int
    ) -> np.ndarray:
        """Return the positions of all rows, int64 [num_components, num_tokens].

        A prompt brings its own positions. Those of output tokens are `generated` from their index.
        """
        positions = np.tile(generated, (num_components, 1))
        for chunk, start in prefills:
            own = chunk.request.positions[:, chunk.begin : chunk.end]
            positions[:, start : start + own.shape[1]] = own
        return positions

    def _item_rows(self, prefills: list[tuple[Chunk, int]]) -> np.ndarray:
        rows = [np.zeros(0, np.int64)]
        for chunk, start in prefills:
            offset = start - chunk.begin
            rows += [np.arange(begin + offset, end + offset) for _, begin, end in items_in(chunk)]
        return np.concatenate(rows)


def items_in(chunk: Chunk) -> list[tuple[int, int, int]]:
    """Return (item, begin, end) of the placeholders that fall into the chunk."""
    if not chunk.has_prompt:
        return []
    overlaps = [
        (i, max(offset, chunk.begin), min(offset + length, chunk.end))
        for i, (offset, length) in enumerate(chunk.request.placeholders)
    ]
    return [(i, begin, end) for i, begin, end in overlaps if begin < end]


def embeddings_of(chunk: Chunk) -> list[object]:
    """Return the parts of the items' embeddings that fall into the chunk, in row order."""
    parts = []
    for i, begin, end in items_in(chunk):
        offset, _ = chunk.request.placeholders[i]
        parts.append(chunk.request.embeddings[i][begin - offset : end - offset])
    return parts
