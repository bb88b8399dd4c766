"""Sequences in a paged KV cache for the tests of the attention kernels, and attention written out.

All that is not a token of a sequence is NaN in the cache: the end of its last block, other blocks,
and the block that fills up the tables.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compute.triton_kernels.paged_attention import Sequences, attend
from tests.kernels import HAS_CARD

PADDING_BLOCK = 0
UNTOUCHED = 77.0
"""What rows hold that no kernel should write."""


def written_out(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, scale_T: Tensor, causal: bool = True
) -> Tensor:
    """Return attention in float32. The last query sees all keys, each one before it a key less."""
    group = q_THD.shape[1] // k_SKD.shape[1]
    k = k_SKD.float().repeat_interleave(group, 1)
    v = v_SKD.float().repeat_interleave(group, 1)
    scaled = q_THD.float() * (scale_T * q_THD.shape[2] ** -0.5)[:, None, None]
    rows = []
    for i, q in enumerate(scaled):
        seen = len(k) - len(scaled) + i + 1 if causal else len(k)
        weights = torch.einsum("hd,shd->hs", q, k[:seen]).softmax(-1)
        rows.append(torch.einsum("hs,shd->hd", weights, v[:seen]))
    return torch.stack(rows)


@dataclass(frozen=True)
class Case:
    """A batch, whose sequences stand in it with `gap` rows before each that belong to none."""

    q: Tensor
    keys: list[Tensor]
    """[context, K, D] of each sequence."""
    values: list[Tensor]
    scale: Tensor
    query_starts: list[int]
    query_lens: list[int]
    block_size: int

    @classmethod
    def of(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        num_heads: int = 2,
        num_kv_heads: int = 1,
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float16,
        gap: int = 0,
    ) -> "Case":
        draw = torch.Generator().manual_seed(5)
        num_rows = sum(query_lens) + gap * len(query_lens)
        tokens = [
            torch.randn(2, context, num_kv_heads, head_dim, generator=draw).to(dtype)
            for context in context_lens
        ]
        starts = [gap * (i + 1) + sum(query_lens[:i]) for i in range(len(query_lens))]
        return cls(
            torch.randn(num_rows, num_heads, head_dim, generator=draw).to(dtype),
            [k for k, _ in tokens],
            [v for _, v in tokens],
            torch.ones(num_rows),
            starts,
            query_lens,
            block_size,
        )

    def expected(self) -> Tensor:
        out = torch.full(self.q.shape, UNTOUCHED)
        for start, query, k, v in zip(
            self.query_starts, self.query_lens, self.keys, self.values, strict=True
        ):
            rows = slice(start, start + query)
            out[rows] = written_out(self.q[rows], k, v, self.scale[rows])
        return out

    def computed(self, max_context: int | None = None) -> Tensor:
        cache, tables = self._paged()
        context_lens = [len(k) for k in self.keys]
        sequences = Sequences(
            int32(self.query_starts),
            int32(self.query_lens),
            int32(context_lens),
            tables,
            max(self.query_lens),
            max_context or max(context_lens),
        )
        out = torch.full(self.q.shape, UNTOUCHED, dtype=self.q.dtype)
        scale = None if self.scale.eq(1).all() else self.scale
        attend(self.q, cache, sequences, out, scale)
        return out.float()

    def _paged(self) -> tuple[Tensor, Tensor]:
        """Return the cache, and the tables of blocks that are dealt at random."""
        num_blocks = [-(-len(k) // self.block_size) for k in self.keys]
        dealt = 1 + torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(6))
        tables = torch.full((len(self.keys), max(num_blocks)), PADDING_BLOCK)
        cache = torch.full(
            (2, 1 + len(dealt), self.block_size, *self.keys[0].shape[1:]), torch.nan
        ).to(self.q.dtype)
        sequences = zip(dealt.split(num_blocks), self.keys, self.values, strict=True)
        for i, (blocks, k, v) in enumerate(sequences):
            tables[i, : len(blocks)] = blocks
            position = torch.arange(len(k))
            where = blocks[position // self.block_size], position % self.block_size
            cache[0][where] = k
            cache[1][where] = v
        return cache, tables.int()


def int32(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far results of this type may be from those in float32."""
    # A card's powers of two are approximate.
    exact = 1e-5 if HAS_CARD else 3e-6
    return {torch.float32: exact, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]


def assert_equal(case: Case, computed: Tensor) -> None:
    torch.testing.assert_close(
        computed, case.expected(), rtol=0, atol=tolerance(case.q.dtype), equal_nan=True
    )
