"""A vision tower with static shapes: an item is padded to a bucket, its padding masked and dropped.

Every shape in the computation depends on the bucket alone. Cards whose towers are compiled in
advance need that.
"""

from functools import lru_cache
from typing import Generic

import torch
import torch.nn.functional as F
from torch import Tensor

from common.buckets import bucket_of
from services.vision.tower import MAX_CACHED_PLANS, Plan, VisionTower, check_patches
from services.vision.tower_thread import ItemShape


class StaticTower(Generic[Plan]):
    """Runs any family's tower at the lengths of a few buckets only."""

    def __init__(self, tower: VisionTower[Plan], buckets: tuple[int, ...]) -> None:
        """`buckets` are numbers of patches in ascending order."""
        self.buckets = buckets
        self._tower = tower
        self._plan = lru_cache(MAX_CACHED_PLANS)(tower.plan)

    @torch.inference_mode()
    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """uint8 [num_patches, values_per_patch] on any device -> [num_tokens, output_width].

        Raises
        ------
        ValueError
            if the item has more patches than the largest bucket.
        """
        check_patches(patches, shape, self._tower.values_per_patch)
        length = self._length(len(patches))
        padding = length - len(patches)
        padded = F.pad(patches.to(self._tower.device), (0, 0, 0, padding))
        rows = self._tower.forward(padded, self._plan(shape, length))
        return rows[: self._tower.num_tokens(shape)]

    def _length(self, num_patches: int) -> int:
        bucket = bucket_of(num_patches, self.buckets)
        if not bucket:
            raise ValueError(f"{num_patches} patches fit into none of the buckets {self.buckets}")
        return self._tower.padded_length(bucket)
