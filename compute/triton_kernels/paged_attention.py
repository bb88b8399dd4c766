"""Attention over the paged KV cache in Triton: decodes, chunks of prompts, and both mixed.

It computes with any head size, block size and group of query heads, in bfloat16, float16 and
float32. Untried: no CUDA device was at hand when this was written.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from compute.triton_kernels.attention_kernels import attend_splits, attend_tiles, merge_splits
from compute.triton_kernels.attention_tiles import (
    Card,
    constants_of,
    softmax_scale,
    tile_of_decode,
    tile_of_queries,
)

PROGRAMS_PER_MULTIPROCESSOR = 2
"""How many programs of a decode find room together."""
MAX_SPLITS = 64
MIN_TILES = 2
"""The fewest tiles of keys that are worth a split of their own."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of one call. They need not be neighbours in the batch."""

    query_starts: Tensor
    """int32 [num_seqs]: the first row of each in the batch."""
    query_lens: Tensor
    """int32 [num_seqs]: the new tokens of each."""
    context_lens: Tensor
    """int32 [num_seqs]: the tokens of each in the KV cache, the new ones included."""
    block_tables: Tensor
    """int32 [num_seqs, max_num_blocks]: the blocks of each."""
    max_query: int
    """No query is longer."""
    max_context: int
    """No context is longer. In a captured graph it is the longest possible one."""


def attend(
    q_THD: Tensor,
    cache: Tensor,
    sequences: Sequences,
    out_THD: Tensor,
    scale_T: Tensor | None = None,
) -> None:
    """Attend from the new tokens of some sequences to all of their tokens in the KV cache.

    The last new token of a sequence sees its whole context, each one before it a token less. What
    the cache holds past a context, NaN included, has no effect. Nothing waits for the device.

    Parameters
    ----------
    q_THD
        the queries of the whole batch. The heads of a token lie next to each other.
    cache
        [2, num_blocks, block_size, K, D], the keys and the values of a layer.
    out_THD
        the results. Only rows of these sequences are written.
    scale_T
        [T], factors of the queries besides D ** -0.5, applied in float32.
    """
    _check(q_THD, cache, out_THD)
    if len(sequences.query_starts) == 0:
        return
    if sequences.max_query == 1:
        _attend_one(q_THD, cache, sequences, out_THD, scale_T)
    else:
        _attend_many(q_THD, cache, sequences, out_THD, scale_T)


def _attend_many(
    q_THD: Tensor, cache: Tensor, sequences: Sequences, out_THD: Tensor, scale_T: Tensor | None
) -> None:
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = cache.shape[3]
    num_rows = sequences.max_query * (num_heads // num_kv_heads)
    tile = tile_of_queries(head_dim, q_THD.dtype, num_rows, Card.of(q_THD.device))
    constants = constants_of(num_heads, num_kv_heads, head_dim, q_THD.dtype, tile)
    grid = (-(-num_rows // tile.rows), num_kv_heads, len(sequences.query_starts))
    attend_tiles[grid](
        q_THD,
        cache[0],
        cache[1],
        out_THD,
        scale_T,
        sequences.query_starts,
        sequences.query_lens,
        sequences.context_lens,
        sequences.block_tables,
        softmax_scale(head_dim),
        sequences.block_tables.stride(0),
        Q_STRIDE=q_THD.stride(0),
        OUT_STRIDE=out_THD.stride(0),
        KEY_STRIDE=num_kv_heads * head_dim,
        BLOCK_SIZE=cache.shape[2],
        CAUSAL=True,
        **constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _attend_one(
    q_THD: Tensor, cache: Tensor, sequences: Sequences, out_THD: Tensor, scale_T: Tensor | None
) -> None:
    num_seqs = len(sequences.query_starts)
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = cache.shape[3]
    card = Card.of(q_THD.device)
    tile = tile_of_decode(head_dim, q_THD.dtype, num_heads // num_kv_heads, card)
    constants = constants_of(num_heads, num_kv_heads, head_dim, q_THD.dtype, tile)
    num_splits = count_splits(num_seqs * num_kv_heads, sequences.max_context, tile.keys, card)
    sums, tops, totals = _partial_results((num_seqs, num_heads, num_splits), head_dim, q_THD.device)
    attend_splits[num_kv_heads, num_seqs, num_splits](
        q_THD,
        cache,
        out_THD,
        sums,
        tops,
        totals,
        scale_T,
        sequences.query_starts,
        sequences.context_lens,
        sequences.block_tables,
        softmax_scale(head_dim),
        cache.stride(0),
        sequences.block_tables.stride(0),
        num_splits,
        Q_STRIDE=q_THD.stride(0),
        OUT_STRIDE=out_THD.stride(0),
        BLOCK_SIZE=cache.shape[2],
        SPLIT=num_splits > 1,
        **constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        merge_splits[num_heads, num_seqs](
            out_THD,
            sums,
            tops,
            totals,
            sequences.query_starts,
            sequences.context_lens,
            num_splits,
            NUM_HEADS=num_heads,
            OUT_STRIDE=out_THD.stride(0),
            HEAD_DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim),
            MAX_SPLITS=triton.next_power_of_2(num_splits),
            KEYS=tile.keys,
            num_warps=4,
        )


def _partial_results(
    shape: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return room for the splits of (num_seqs, num_heads, num_splits); None for a single one."""
    if shape[2] == 1:
        return None, None, None
    sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
    tops = torch.empty(shape, dtype=torch.float32, device=device)
    return sums, tops, torch.empty_like(tops)


def count_splits(num_programs: int, max_context: int, keys: int, card: Card) -> int:
    """Return in how many splits a decode of `num_programs` sequences and heads fills the card."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * card.num_multiprocessors, num_programs)
    return max(1, min(wanted, MAX_SPLITS, max_context // (MIN_TILES * keys)))


def _check(q_THD: Tensor, cache: Tensor, out_THD: Tensor) -> None:
    num_heads, head_dim = q_THD.shape[1:]
    assert num_heads % cache.shape[3] == 0 and cache.shape[4] == head_dim
    assert q_THD.dtype == cache.dtype == out_THD.dtype
    assert q_THD.stride()[1:] == out_THD.stride()[1:] == (head_dim, 1)
    assert cache[0].is_contiguous(), "blocks have no gaps"
