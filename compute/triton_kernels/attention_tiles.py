"""The sizes of the attention kernels' tiles: for a head size, a data type and a card's memory."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

MIN_ROWS = 16
"""The fewest rows of a product on tensor cores."""
KIB = 1024
RESERVED_SHARED_MEMORY = KIB
"""What a card keeps for itself of a multiprocessor's memory, from Ampere on."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program of an attention kernel walks over its keys."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


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
class Card:
    """What the sizes of tiles and the number of splits depend on."""

    num_multiprocessors: int
    shared_memory: int
    """The bytes that one block may have."""

    @classmethod
    def of(cls, device: torch.device) -> "Card":
        return _card(device.index) if device.type == "cuda" else INTERPRETER


INTERPRETER = Card(num_multiprocessors=1, shared_memory=99 * KIB)
"""The smallest card since Ampere, with a single multiprocessor."""


@cache
def _card(index: int | None) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor - RESERVED_SHARED_MEMORY,
    )


def tile_of_queries(head_dim: int, dtype: torch.dtype, most_rows: int, card: Card) -> Tile:
    """Return the tile for many queries, of sequences with at most `most_rows` rows of queries."""
    width = HeadParts.of(head_dim).width
    if dtype == torch.float32:
        return Tile(rows=MIN_ROWS if width > 64 else 32, keys=32, num_warps=4, num_stages=1)
    rows = min(64 if width > 128 else 128, max(MIN_ROWS, triton.next_power_of_2(most_rows)))
    num_warps = 8 if rows == 128 else 4
    keys = 64
    return Tile(rows, keys, num_warps, _stages(rows, keys, width, card))


def tile_of_decode(head_dim: int, dtype: torch.dtype, group: int, card: Card) -> Tile:
    """Return the tile for the `group` query heads of one token that share a key head."""
    width = HeadParts.of(head_dim).width
    rows = max(MIN_ROWS, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return Tile(rows, keys=32, num_warps=4, num_stages=1)
    keys = 64
    return Tile(rows, keys, num_warps=4, num_stages=_stages(rows, keys, width, card))


def _stages(rows: int, keys: int, width: int, card: Card) -> int:
    """Return how many tiles of keys and values, of two bytes a number, fit next to the queries."""
    room = card.shared_memory - 2 * rows * width
    return max(1, min(3, room // (2 * 2 * keys * width)))


def softmax_scale(head_dim: int) -> float:
    """Return what scores of a head size are multiplied by before powers of two are computed."""
    return head_dim**-0.5 * math.log2(math.e)


def precision(dtype: torch.dtype) -> str:
    """Return how exact products are: float32 is not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"
