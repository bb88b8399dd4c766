"""The sizes of the attention kernels' tiles: for a head size, a data type and a card."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

KIB = 1024
RESERVED_SHARED_MEMORY = KIB
"""What a card keeps for itself of a multiprocessor's memory, from Ampere on."""
WIDE_PRODUCTS = (9, 10)
"""The major compute capabilities on which the warps of a program multiply together."""
MIN_ROWS = 16
"""The fewest rows of a product on tensor cores."""
WARP_ROWS = 16
"""The rows of queries that one warp computes."""


@dataclass(frozen=True, slots=True)
class Card:
    """What the sizes of tiles and the number of splits depend on."""

    num_multiprocessors: int
    shared_memory: int
    """The bytes that one program may have."""
    major: int
    """The first number of the compute capability."""

    @classmethod
    def of(cls, device: torch.device) -> "Card":
        return _card(device.index) if device.type == "cuda" else INTERPRETER


INTERPRETER = Card(num_multiprocessors=1, shared_memory=99 * KIB, major=8)
"""The smallest card since Ampere, with a single multiprocessor."""


@cache
def _card(index: int | None) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor - RESERVED_SHARED_MEMORY,
        properties.major,
    )


@dataclass(frozen=True, slots=True)
class HeadParts:
    """A head size as a power of two and a smaller one, or as one only with `rest` 0."""

    main: int
    rest: int

    @classmethod
    def of(cls, head_dim: int) -> "HeadParts":
        main = max(16, 1 << (head_dim.bit_length() - 1))
        if head_dim <= main:
            return cls(main, 0)
        rest = max(16, triton.next_power_of_2(head_dim - main))
        return cls(main, rest) if rest < main else cls(2 * main, 0)

    @property
    def width(self) -> int:
        return self.main + self.rest


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program of an attention kernel passes over its keys."""

    rows: int
    """Queries."""
    keys: int
    """At a time."""
    num_warps: int
    num_stages: int
    """The tiles of keys that are in shared memory together."""


def tile_of_queries(head_dim: int, dtype: torch.dtype, most_rows: int, card: Card) -> Tile:
    """Return the tile for sequences with at most `most_rows` rows of queries.

    A larger one spills registers, by the compiler's account for sm_80, sm_90 and sm_100.
    """
    width = HeadParts.of(head_dim).width
    if dtype == torch.float32:
        return Tile(rows=64 if width <= 96 else 32, keys=32, num_warps=8, num_stages=1)
    rows = 64 if most_rows <= 64 or width > 128 else 128
    if card.major in WIDE_PRODUCTS:
        keys = rows if width <= 96 else 64
    else:
        keys = 64 if width <= 96 else 32
    # With two, the next tile is loaded only when this one is done with. More would be idle for the
    # short sequences of windows, which have one tile.
    useful = 3 if rows == 128 else 2
    num_stages = min(useful, _room(rows, keys, width, card))
    return Tile(rows, keys, rows // WARP_ROWS, num_stages)


def tile_of_decode(head_dim: int, dtype: torch.dtype, group: int, card: Card) -> Tile:
    """Return the tile for the `group` query heads of one token that share a key head."""
    rows = max(MIN_ROWS, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return Tile(rows, keys=16, num_warps=4, num_stages=3)
    num_stages = min(3, _room(rows, 64, HeadParts.of(head_dim).width, card))
    return Tile(rows, keys=64, num_warps=4, num_stages=num_stages)


def _room(rows: int, keys: int, width: int, card: Card) -> int:
    """Return how many tiles of keys and values fit in memory, in half precision."""
    queries = 2 * rows * width
    return max(1, (card.shared_memory - queries) // (2 * 2 * keys * width))


def constants_of(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, tile: Tile
) -> dict[str, Any]:
    """Return the constants that the kernels for tiles and for splits share."""
    parts = HeadParts.of(head_dim)
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "MAIN": parts.main,
        "REST": parts.rest,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        # float32 is not rounded to TF32. Other types are not concerned.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def softmax_scale(head_dim: int) -> float:
    """Return what scores of a head size are multiplied by before powers of two are computed."""
    return head_dim**-0.5 * math.log2(math.e)
