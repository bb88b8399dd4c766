"""Attention of a mixed batch over the paged KV cache.

One object is made for each step from its plan and used by every layer. `GatheredAttention` runs on any device: it gathers the
blocks of a sequence into one tensor and leaves the rest to scaled_dot_product_attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from services.llm.plan import StepPlan


class StepAttention(Protocol):
    def run(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: Tensor) -> Tensor:
        """Write the keys and values of T tokens to a layer's cache [2, num_blocks, block_size, K, D]; returns [T, H * D]."""


@dataclass(frozen=True, slots=True)
class Decodes:
    """All sequences of one new token: one attention over their blocks, padded to the longest."""

    rows: Tensor | None
    """int64 [B]: their rows in the batch; None where the batch has no others."""
    blocks: Tensor
    """int64 [B * num_blocks]."""
    max_context: int
    mask: Tensor | None
    """[B, 1, 1, max_context], added to the scores; None where all contexts are equally long."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence of several new tokens, at `start` to `stop` of the batch."""

    start: int
    stop: int
    context: int
    blocks: Tensor
    mask: Tensor | None
    """[stop - start, context], added to the scores; None where the chunk is the whole context."""


class GatheredAttention:
    def __init__(self, plan: StepPlan, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device, self._block_size = dtype, device, block_size
        self._slots = torch.tensor(plan.slot_mapping, device=device)
        self._decodes = self._plan_decodes(plan)
        self._chunks = list(self._plan_chunks(plan))

    def run(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: Tensor) -> Tensor:
        flat = cache.flatten(1, 2)
        flat[0].index_copy_(0, self._slots, k_TKD)
        flat[1].index_copy_(0, self._slots, v_TKD)
        if not self._chunks and self._decodes:
            return self._decode(q_THD, cache, self._decodes)
        out = torch.empty(len(q_THD), q_THD.shape[1] * q_THD.shape[2], dtype=q_THD.dtype, device=q_THD.device)
        if self._decodes:
            out[self._decodes.rows] = self._decode(q_THD[self._decodes.rows], cache, self._decodes)
        for chunk in self._chunks:
            new = slice(chunk.start, chunk.stop)
            k, v = (k_TKD[new], v_TKD[new]) if chunk.mask is None else self._gather(cache, chunk.blocks, chunk.context)
            out[new] = self._prefill(q_THD[new], k, v, chunk.mask)
        return out

    def _decode(self, q_BHD: Tensor, cache: Tensor, decodes: Decodes) -> Tensor:
        """The query heads that share a key head take the place of query positions, so that keys are never repeated."""
        num_kv_heads, head_dim = cache.shape[-2:]
        q = q_BHD.reshape(len(q_BHD), num_kv_heads, -1, head_dim)
        k, v = (
            paged.index_select(0, decodes.blocks).view(len(q), -1, num_kv_heads, head_dim)[:, : decodes.max_context].transpose(1, 2)
            for paged in cache
        )
        return F.scaled_dot_product_attention(q, k, v, decodes.mask).flatten(1)

    def _prefill(self, q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, mask: Tensor | None) -> Tensor:
        """Key heads are the batch and the query heads that share one its heads, so that keys are viewed, not repeated."""
        length, num_heads, head_dim = q_THD.shape
        groups = num_heads // k_SKD.shape[1]
        q = q_THD.view(length, -1, groups, head_dim).permute(1, 2, 0, 3)
        k, v = (x.transpose(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (k_SKD, v_SKD))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return out.permute(2, 0, 1, 3).reshape(length, num_heads * head_dim)

    def _gather(self, cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [length, K, D] of one sequence."""
        k, v = (paged.index_select(0, blocks).flatten(0, 1)[:length] for paged in cache)
        return k, v

    def _plan_decodes(self, plan: StepPlan) -> Decodes | None:
        is_decode = plan.query_lens == 1
        if not is_decode.any():
            return None
        contexts = plan.context_lens[is_decode]
        num_blocks = -(-contexts // self._block_size)
        tables = plan.block_tables[is_decode, : num_blocks.max()]
        # Padding repeats a sequence's own first block: what is masked must be finite all the same.
        tables = np.where(np.arange(tables.shape[1]) < num_blocks[:, None], tables, tables[:, :1])
        mask = None
        if (contexts != contexts[0]).any():
            mask = self._mask(np.arange(contexts.max()) < contexts[:, None])[:, None, None]
        rows = None if is_decode.all() else self._tensor((plan.query_lens.cumsum() - 1)[is_decode])
        return Decodes(rows, self._tensor(tables.reshape(-1)), int(contexts.max()), mask)

    def _plan_chunks(self, plan: StepPlan) -> Iterator[Chunk]:
        stops = plan.query_lens.cumsum()
        for i in np.flatnonzero(plan.query_lens > 1):
            query, context = int(plan.query_lens[i]), int(plan.context_lens[i])
            mask = None
            if context > query:
                mask = self._mask(np.arange(context) <= np.arange(context - query, context)[:, None])
            blocks = self._tensor(plan.block_tables[i, : -(-context // self._block_size)])
            yield Chunk(int(stops[i]) - query, int(stops[i]), context, blocks, mask)

    def _mask(self, visible: np.ndarray) -> Tensor:
        return torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(~visible), -torch.inf).to(self._device)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self._device)
