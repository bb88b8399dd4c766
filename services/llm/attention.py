"""Attention of a mixed batch over the paged KV cache.

One object is made for each step from its plan and used by every layer. `GatheredAttention` runs on
any device: it gathers the blocks of a sequence into one tensor. Decodes on a CPU read the blocks
where they lie, if there is a kernel for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels.operations import (
    attention,
    can_attend_blocks,
    decode_attention,
    rotate_and_store,
)
from services.llm.step_plan import StepPlan

RotaryTables = tuple[Tensor, Tensor]
"""Cosines and signed sines, float32 [T, head_dim] each. The first half of the sines is negated."""


class StepAttention(Protocol):
    """The attention of one step, the same for every layer."""

    def run(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        tables: RotaryTables,
        scale: Tensor | None,
        cache: Tensor,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to a layer's cache, and attend to it.

        Parameters
        ----------
        qkv
            [T, H + 2K, D]: query heads, then key heads, then value heads. It is overwritten.
        num_heads, num_kv_heads
            H and K.
        tables
            The rotary tables of the tokens.
        scale
            [T] in the dtype of the queries: factors of the rotated queries; None for one.
        cache
            [2, num_blocks, block_size, K, D].

        Returns
        -------
        [T, H * D].
        """


@dataclass(frozen=True, slots=True)
class Decodes:
    """All sequences of a step with one new token."""

    rows: Tensor | None
    """int64 [B]: the rows of these sequences in the batch; None if the batch has no others."""
    tables: Tensor
    """int64 [B, num_blocks]: the blocks of each sequence."""
    contexts: Tensor
    """int64 [B]: the tokens of each sequence in the KV cache."""
    max_context: int
    mask: Tensor | None
    """[B, 1, 1, max_context], added to the scores; None if all contexts are equally long."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A sequence with several new tokens, in rows `start` to `stop` of the batch."""

    start: int
    stop: int
    context: int
    blocks: Tensor


class GatheredAttention:
    """A StepAttention for any device."""

    def __init__(
        self, plan: StepPlan, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._block_size = block_size
        self._slots = self._tensor(plan.slot_mapping)
        self._decodes = self._plan_decodes(plan)
        self._chunks = list(self._plan_chunks(plan))

    def run(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        tables: RotaryTables,
        scale: Tensor | None,
        cache: Tensor,
    ) -> Tensor:
        rotate_and_store(qkv, num_heads, num_kv_heads, *tables, cache, self._slots)
        q_THD, k_TKD, v_TKD = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
        if scale is not None:
            q_THD = q_THD * scale[:, None, None]
        if not self._chunks and self._decodes:
            return self._decode(q_THD, cache, self._decodes)
        out = torch.empty(
            len(q_THD), q_THD.shape[1] * q_THD.shape[2], dtype=q_THD.dtype, device=q_THD.device
        )
        if self._decodes:
            out[self._decodes.rows] = self._decode(q_THD[self._decodes.rows], cache, self._decodes)
        for chunk in self._chunks:
            new = slice(chunk.start, chunk.stop)
            is_whole = chunk.context == chunk.stop - chunk.start
            if is_whole:
                k = k_TKD[new]
                v = v_TKD[new]
            else:
                k, v = self._gather(cache, chunk.blocks, chunk.context)
            out[new] = attention(q_THD[new], k, v, causal=True)
        return out

    def _decode(self, q_BHD: Tensor, cache: Tensor, decodes: Decodes) -> Tensor:
        """[B, H, D] -> [B, H * D].

        Query heads that share a key head take the place of query positions, so that no key is
        repeated.
        """
        if can_attend_blocks(q_BHD.shape[1], cache):
            return decode_attention(q_BHD, cache, decodes.tables, decodes.contexts)
        num_kv_heads, head_dim = cache.shape[-2:]
        q = q_BHD.reshape(len(q_BHD), num_kv_heads, -1, head_dim)
        k, v = (
            paged.index_select(0, decodes.tables.flatten())
            .view(len(q), -1, num_kv_heads, head_dim)[:, : decodes.max_context]
            .transpose(1, 2)
            for paged in cache
        )
        return F.scaled_dot_product_attention(q, k, v, decodes.mask).flatten(1)

    def _gather(self, cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of one sequence, [length, K, D] each."""
        k, v = (paged.index_select(0, blocks).flatten(0, 1)[:length] for paged in cache)
        return k, v

    def _plan_decodes(self, plan: StepPlan) -> Decodes | None:
        is_decode = plan.query_lens == 1
        if not is_decode.any():
            return None
        contexts = plan.context_lens[is_decode]
        num_blocks = -(-contexts // self._block_size)
        tables = plan.block_tables[is_decode, : num_blocks.max()]
        # Padding repeats the first block of the sequence: masked values must be finite, too.
        tables = np.where(np.arange(tables.shape[1]) < num_blocks[:, None], tables, tables[:, :1])
        mask = None
        if (contexts != contexts[0]).any():
            mask = self._mask(np.arange(contexts.max()) < contexts[:, None])[:, None, None]
        rows = None if is_decode.all() else self._tensor((plan.query_lens.cumsum() - 1)[is_decode])
        return Decodes(
            rows, self._tensor(tables), self._tensor(contexts), int(contexts.max()), mask
        )

    def _plan_chunks(self, plan: StepPlan) -> Iterator[PrefillChunk]:
        stops = plan.query_lens.cumsum()
        for i in np.flatnonzero(plan.query_lens > 1):
            query = int(plan.query_lens[i])
            context = int(plan.context_lens[i])
            blocks = self._tensor(plan.block_tables[i, : -(-context // self._block_size)])
            yield PrefillChunk(int(stops[i]) - query, int(stops[i]), context, blocks)

    def _mask(self, visible: np.ndarray) -> Tensor:
        return (
            torch.zeros(visible.shape, dtype=self._dtype)
            .masked_fill_(torch.from_numpy(~visible), -torch.inf)
            .to(self._device)
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self._device)
