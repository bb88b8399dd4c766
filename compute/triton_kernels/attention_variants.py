"""The attention kernels as models launch them, for the ahead-of-time compiler."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from compute.triton_kernels.attention_kernels import attend_splits, attend_tiles, merge_splits
from compute.triton_kernels.attention_tiles import (
    KIB,
    Card,
    Tile,
    constants_of,
    tile_of_decode,
    tile_of_queries,
)
from compute.triton_kernels.variant import Variant

AMPERE = Card(num_multiprocessors=108, shared_memory=163 * KIB, major=8)
HOPPER = Card(num_multiprocessors=132, shared_memory=227 * KIB, major=9)
CHUNK_ROWS = 1024
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PAGED_HEADS = (
    (28, 4, 128, 16, torch.bfloat16),
    (28, 4, 128, 256, torch.bfloat16),
    (16, 2, 128, 128, torch.float16),
    (32, 32, 96, 64, torch.bfloat16),
    (28, 4, 128, 16, torch.float32),
)
"""(query heads, key heads, head size, block size, type) of language models; the first is 7B's."""
DENSE_HEADS = (
    (16, 80, 4784, torch.bfloat16),
    (16, 80, 64, torch.bfloat16),
    (16, 104, 1024, torch.bfloat16),
    (16, 80, 4784, torch.float32),
)
"""(heads, head size, longest sequence, type) of vision towers."""


def variants() -> Iterator[Variant]:
    """Return the kernels with the tiles of Ampere cards, and those for wider products."""
    for heads in PAGED_HEADS:
        yield from _decodes(*heads)
        _, _, head_dim, _, dtype = heads
        for card in _cards(head_dim, dtype, CHUNK_ROWS):
            yield _for_card(_chunk(*heads, card), card)
    for tower in DENSE_HEADS:
        _, head_dim, length, dtype = tower
        for card in _cards(head_dim, dtype, length):
            yield _for_card(_dense(*tower, card), card)
    yield _merge()


def _cards(head_dim: int, dtype: torch.dtype, num_rows: int) -> list[Card | None]:
    """Return the cards that have tiles of their own; None if all have the same."""
    narrow, wide = (tile_of_queries(head_dim, dtype, num_rows, card) for card in (AMPERE, HOPPER))
    return [None] if narrow == wide else [AMPERE, HOPPER]


def _for_card(variant: Variant, card: Card | None) -> Variant:
    """Return the variant for the architectures that launch it."""
    if card is None:
        return variant
    if card is AMPERE:
        return replace(variant, max_arch=10 * HOPPER.major - 1)
    return replace(variant, name=f"{variant.name} (wide)", min_arch=10 * HOPPER.major)


def _decodes(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> Iterator[Variant]:
    tile = tile_of_decode(head_dim, dtype, num_heads // num_kv_heads, AMPERE)
    for split in (False, True):
        constants = {
            "scale_ptr": None,
            "Q_STRIDE": (num_heads + 2 * num_kv_heads) * head_dim,
            "OUT_STRIDE": num_heads * head_dim,
            "BLOCK_SIZE": block_size,
            "SPLIT": split,
            **constants_of(num_heads, num_kv_heads, head_dim, dtype, tile),
        }
        if not split:
            constants |= dict.fromkeys(("sums_ptr", "tops_ptr", "totals_ptr"))
        name = f"decode{' in splits' if split else ''}, blocks of {block_size}"
        yield _variant(name, attend_splits, dtype, constants, tile)


def _chunk(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    card: Card | None,
) -> Variant:
    tile = tile_of_queries(head_dim, dtype, CHUNK_ROWS, card or AMPERE)
    constants = {
        "Q_STRIDE": (num_heads + 2 * num_kv_heads) * head_dim,
        "OUT_STRIDE": num_heads * head_dim,
        "KEY_STRIDE": num_kv_heads * head_dim,
        "BLOCK_SIZE": block_size,
        "CAUSAL": True,
        **constants_of(num_heads, num_kv_heads, head_dim, dtype, tile),
    }
    return _variant(f"chunk, blocks of {block_size}", attend_tiles, dtype, constants, tile)


def _dense(
    num_heads: int, head_dim: int, length: int, dtype: torch.dtype, card: Card | None
) -> Variant:
    tile = tile_of_queries(head_dim, dtype, length, card or AMPERE)
    constants = {
        **dict.fromkeys(("scale_ptr", "query_lens_ptr", "context_lens_ptr", "tables_ptr")),
        "Q_STRIDE": 3 * num_heads * head_dim,
        "OUT_STRIDE": num_heads * head_dim,
        "KEY_STRIDE": 3 * num_heads * head_dim,
        "BLOCK_SIZE": 0,
        "CAUSAL": False,
        **constants_of(num_heads, num_heads, head_dim, dtype, tile),
    }
    return _variant(f"dense of {length}", attend_tiles, dtype, constants, tile)


def _merge() -> Variant:
    constants = {
        "NUM_HEADS": 28,
        "OUT_STRIDE": 28 * 128,
        "HEAD_DIM": 128,
        "WIDTH": 128,
        "MAX_SPLITS": 64,
        "KEYS": 64,
    }
    tile = Tile(rows=1, keys=64, num_warps=4, num_stages=3)
    return _variant("merge of splits", merge_splits, torch.bfloat16, constants, tile)


def _variant(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    tile: Tile,
) -> Variant:
    return Variant(
        f"{name}, {NAMES[dtype]}, heads of {constants['HEAD_DIM']}",
        kernel,
        {
            argument: "constexpr" if argument in constants else _type_of(argument, dtype)
            for argument in kernel.arg_names
        },
        constants,
        tile.num_warps,
        tile.num_stages,
    )


def _type_of(argument: str, dtype: torch.dtype) -> str:
    if argument in ("q_ptr", "k_ptr", "v_ptr", "cache_ptr", "out_ptr"):
        return f"*{NAMES[dtype]}"
    if argument in ("sums_ptr", "tops_ptr", "totals_ptr", "scale_ptr"):
        return "*fp32"
    if argument.endswith("_ptr"):
        return "*i32"
    return {"softmax_scale": "fp32", "values_stride": "i64"}.get(argument, "i32")
