"""Decode steps as CUDA graphs: one launch for hundreds of small kernels.

A graph is captured at start for each of some batch sizes; a batch takes the next larger one. What
fills it up computes into a scratch block and is dropped. Untried: no CUDA device was at hand when
it was written.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compute.cuda_graphs import GraphPool
from services.llm.cuda_attention import Call, PagedAttention
from services.llm.families.qwen2_5_vl import LanguageModel
from services.llm.packing import pack, unpack, upload
from services.llm.step_plan import StepPlan


def captured_sizes(max_num_seqs: int) -> list[int]:
    """Close together where a row more is felt, and always the largest batch that there can be."""
    return [
        size
        for size in (1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 32))
        if size < max_num_seqs
    ] + [max_num_seqs]


class DecodeGraphs:
    """Graphs of the whole forward pass for steps in which every sequence has one new token.

    `kv_cache` is that of the model, `scratch_block` one of its blocks that no sequence is ever
    given.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        kv_cache: Tensor,
        scratch_block: int,
        max_context: int,
        sizes: Iterable[int],
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._scratch_block = scratch_block
        self._block_size = kv_cache.shape[3]
        self._width = -(-max_context // self._block_size)
        self._sizes = sorted(sizes)
        num_values = sum(map(math.prod, self._shapes(self._sizes[-1])))
        self._buffer = torch.zeros(num_values, dtype=torch.int64, device=model.device)
        pool = GraphPool(model.device)
        self._graphs = {}
        # The largest first: the others find room in the memory that it took.
        for size in reversed(self._sizes):
            self._send(self._blank(size))
            self._graphs[size] = pool.capture(partial(self._compute, size))
            progress(1.0)

    def covers(self, plan: StepPlan) -> bool:
        num_seqs, num_blocks = plan.block_tables.shape
        is_decode = plan.num_tokens == num_seqs and len(plan.embedding_rows) == 0
        return is_decode and num_seqs <= self._sizes[-1] and num_blocks <= self._width

    def run(self, plan: StepPlan) -> Tensor:
        """float32 logits [num_sampled, vocab_size], as the model computes them."""
        num_seqs = len(plan.query_lens)
        size = self._sizes[bisect_left(self._sizes, num_seqs)]
        self._send(self._filled(size, plan))
        graph = self._graphs[size]
        graph.replay()
        if len(plan.sampled_rows) == num_seqs:
            return graph.result[:num_seqs].clone()
        (rows,) = upload([plan.sampled_rows], self._model.device)
        return graph.result[rows]

    def _compute(self, size: int) -> Tensor:
        shapes = self._shapes(size)
        values = self._buffer[: sum(map(math.prod, shapes))]
        token_ids, positions, slots, context_lens, block_tables = unpack(values, shapes)
        call = Call.of(
            None,
            torch.ones_like(context_lens),
            context_lens,
            block_tables,
            1,
            self._width * self._block_size,
        )
        rows = torch.arange(size, device=self._model.device)
        return self._model.forward(
            self._model.embed(token_ids),
            positions,
            PagedAttention(slots, [call]),
            self._kv_cache,
            rows,
        )

    def _shapes(self, size: int) -> list[tuple[int, ...]]:
        """Of token ids, positions, slots, context lengths and block tables."""
        return [(size,), (3, size), (size,), (size,), (size, self._width)]

    def _blank(self, size: int) -> list[np.ndarray]:
        """Rows that see one token, in the scratch block."""
        fillings = (0, 0, self._scratch_block * self._block_size, 1, self._scratch_block)
        return [
            np.full(shape, value, np.int64)
            for shape, value in zip(self._shapes(size), fillings, strict=True)
        ]

    def _filled(self, size: int, plan: StepPlan) -> list[np.ndarray]:
        arrays = self._blank(size)
        token_ids, positions, slots, context_lens, block_tables = arrays
        num_seqs, num_blocks = plan.block_tables.shape
        token_ids[:num_seqs] = plan.token_ids
        positions[:, :num_seqs] = plan.positions
        slots[:num_seqs] = plan.slot_mapping
        context_lens[:num_seqs] = plan.context_lens
        block_tables[:num_seqs, :num_blocks] = plan.block_tables
        return arrays

    def _send(self, arrays: list[np.ndarray]) -> None:
        packed = pack(arrays, self._model.device)
        self._buffer[: len(packed)].copy_(packed, non_blocking=True)
