"""Decode steps as CUDA graphs: one launch for hundreds of small kernels.

A graph is captured at start for each of several batch sizes. A batch uses the next larger graph;
the rows that fill it up compute into a scratch block and are dropped. Untried: no CUDA device was
at hand when this was written.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compute.cuda_graphs import GraphPool
from services.llm.attention_backends.protocol import PagedAttention, PagedBackend
from services.llm.batch import Batch
from services.llm.language_model import LanguageModel
from services.llm.packing import pack, unpack, upload
from services.llm.step_plan import StepPlan


def captured_sizes(max_num_seqs: int) -> list[int]:
    """Return batch sizes, close together while small, ending with the largest possible one."""
    return [
        size
        for size in (1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 32))
        if size < max_num_seqs
    ] + [max_num_seqs]


class DecodeGraphs:
    """Graphs of the whole forward pass for steps in which every sequence has one new token.

    `scratch_block` is a block of `kv_cache` that no sequence ever gets.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        backend: PagedBackend,
        kv_cache: Tensor,
        scratch_block: int,
        max_context: int,
        num_position_components: int,
        sizes: Iterable[int],
        report_loading: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._scratch_block = scratch_block
        self._block_size = kv_cache.shape[3]
        self._width = -(-max_context // self._block_size)
        self._num_position_components = num_position_components
        self._sizes = sorted(sizes)
        self._decodes = {size: backend.of_decodes(size, self._width) for size in self._sizes}
        largest = self._sizes[-1]
        num_values = sum(map(math.prod, self._shapes(largest).values()))
        self._buffer = torch.zeros(num_values, dtype=torch.int64, device=model.device)
        self._tables = torch.zeros(largest, self._width, dtype=torch.int32, device=model.device)
        pool = GraphPool(model.device)
        self._graphs = {}
        # The largest first, so that the others fit into its memory.
        for size in reversed(self._sizes):
            self._send(size, self._blank(size), self._blank_tables(size, 1))
            self._graphs[size] = pool.capture(partial(self._compute, size))
            report_loading(1.0)

    def covers(self, plan: StepPlan) -> bool:
        """Whether a graph can run the step."""
        num_seqs, num_blocks = plan.block_tables.shape
        is_decode = plan.num_tokens == num_seqs and len(plan.item_rows) == 0
        if plan.adapters.any():
            return False  # a graph adds nothing to single rows
        return is_decode and num_seqs <= self._sizes[-1] and num_blocks <= self._width

    def run(self, plan: StepPlan) -> Tensor:
        """Return float32 logits [num_sampled, vocab_size], as the model computes them."""
        num_seqs = len(plan.query_lens)
        size = self._sizes[bisect_left(self._sizes, num_seqs)]
        self._send(size, *self._filled(size, plan))
        graph = self._graphs[size]
        graph.replay()
        if len(plan.sampled_rows) == num_seqs:
            return graph.result[:num_seqs].clone()
        (rows,) = upload([plan.sampled_rows], self._model.device)
        return graph.result[rows]

    def _compute(self, size: int) -> Tensor:
        shapes = self._shapes(size)
        values = self._buffer[: sum(map(math.prod, shapes.values()))]
        inputs = dict(zip(shapes, unpack(values, list(shapes.values())), strict=True))
        attend = self._decodes[size].bind(inputs["context_lens"].int(), self._tables[:size])
        batch = Batch(
            positions=inputs["positions"],
            sampled_rows=torch.arange(size, device=self._model.device),
            item_rows=None,
            sampled_item_rows=None,
            rope_parameters=inputs["rope_parameters"],
            attention=PagedAttention(inputs["slots"], attend),
        )
        x = self._model.embed(inputs["token_ids"])
        return self._model.forward(x, batch, self._kv_cache)

    def _shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a graph's inputs, in the order in which the buffer holds them."""
        return {
            "token_ids": (size,),
            "positions": (self._num_position_components, size),
            "slots": (size,),
            "context_lens": (size,),
            "rope_parameters": (size,),
        }

    def _blank(self, size: int) -> dict[str, np.ndarray]:
        """Return rows that see one token, in the scratch block."""
        fillings = {
            "slots": self._scratch_block * self._block_size,
            "context_lens": 1,
        }
        shapes = self._shapes(size).items()
        return {name: np.full(shape, fillings.get(name, 0), np.int64) for name, shape in shapes}

    def _blank_tables(self, size: int, num_blocks: int) -> np.ndarray:
        return np.full((size, num_blocks), self._scratch_block)

    def _filled(self, size: int, plan: StepPlan) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the inputs of a graph and its block tables, filled up with blank rows."""
        arrays = self._blank(size)
        num_seqs, num_blocks = plan.block_tables.shape
        arrays["token_ids"][:num_seqs] = plan.token_ids
        arrays["positions"][:, :num_seqs] = plan.positions
        arrays["slots"][:num_seqs] = plan.slot_mapping
        arrays["context_lens"][:num_seqs] = plan.context_lens
        arrays["rope_parameters"][:num_seqs] = plan.rope_parameters
        tables = self._blank_tables(size, num_blocks)
        tables[:num_seqs] = plan.block_tables
        return arrays, tables

    def _send(self, size: int, arrays: dict[str, np.ndarray], tables: np.ndarray) -> None:
        """Fill the memory that a graph reads.

        Of the block tables, only as many columns are sent as the longest sequence has. What stands
        behind them belonged to other sequences, and nothing reads it.
        """
        device = self._model.device
        self._decodes[size].prepare(arrays["context_lens"], tables)
        packed = pack([*arrays.values(), tables], device).to(device, non_blocking=True)
        inputs, blocks = packed.split([len(packed) - tables.size, tables.size])
        self._buffer[: len(inputs)].copy_(inputs)
        self._tables[:size, : tables.shape[1]].copy_(blocks.view(tables.shape))
