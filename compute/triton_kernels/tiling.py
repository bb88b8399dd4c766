"""Lays out the inputs of quantized weights, whose groups may have any size and order."""

from dataclasses import dataclass

import torch
from torch import Tensor

ONE_GROUP = 1 << 20
"""The tiles of a group if there is one only."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the inputs of a product are laid out: in tiles, each of one group."""

    tile: int
    """The inputs of a tile: 32, 64 or 128."""
    positions: Tensor
    """int64 [num_tiles * tile]: the input at each place; the number of inputs where there is
    none."""
    is_natural: bool
    """Whether the inputs keep their order, and none but the last places are empty."""
    groups: Tensor
    """int64 [num_groups]: the groups of the weight that these inputs have."""
    tile_groups: Tensor
    """int32 [num_tiles]: the index in `groups` of each tile."""

    @property
    def num_tiles(self) -> int:
        return len(self.tile_groups)

    def regularity(self) -> tuple[int, int]:
        """Return (tiles per group, first): tile i is of group (i + first) // tiles per group.

        The former is 0 if the tiles of groups do not follow such a rule.
        """
        if len(self.groups) == 1:
            return ONE_GROUP, 0
        counts = self.tile_groups.bincount()
        per_group = int(counts.max())
        first = per_group - int(counts[0])
        expected = (torch.arange(self.num_tiles) + first) // per_group
        return (per_group, first) if torch.equal(expected.int(), self.tile_groups) else (0, 0)


def tiled(groups: Tensor) -> Tiling:
    """Return the best layout for inputs of these groups, int64 [num_inputs].

    The largest tiles that leave inputs where they are; or else those that need little padding.
    """
    tilings = [tiled_by(groups, tile) for tile in (128, 64, 32)]
    for tiling in tilings:
        if tiling.is_natural:
            return tiling
    least = len(tilings[-1].positions)
    return next(t for t in tilings if len(t.positions) <= least * 17 // 16)


def tiled_by(groups: Tensor, tile: int) -> Tiling:
    """Return the layout with tiles of this number of inputs: inputs sorted by group, groups padded
    to whole tiles."""
    num_inputs = len(groups)
    in_order, order = groups.sort(stable=True)
    used, counts = in_order.unique_consecutive(return_counts=True)
    num_tiles = -(-counts // tile)
    ends = (num_tiles * tile).cumsum(0)
    shifts = (ends - num_tiles * tile) - (counts.cumsum(0) - counts)
    positions = torch.full((int(ends[-1]),), num_inputs)
    positions[torch.arange(num_inputs) + shifts.repeat_interleave(counts)] = order
    is_natural = torch.equal(positions[:num_inputs], torch.arange(num_inputs))
    tile_groups = torch.arange(len(used)).repeat_interleave(num_tiles).int()
    return Tiling(tile, positions, is_natural, used, tile_groups)
