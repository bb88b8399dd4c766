"""A vision tower that runs each item at its own length."""

from functools import lru_cache
from typing import Generic

import torch
from torch import Tensor

from services.vision.tower import MAX_CACHED_PLANS, Plan, VisionTower, check_patches
from services.vision.tower_thread import ItemShape


class EagerTower(Generic[Plan]):
    """Runs any family's tower without padding and without graphs."""

    def __init__(self, tower: VisionTower[Plan]) -> None:
        self._tower = tower
        self._plan = lru_cache(MAX_CACHED_PLANS)(tower.plan)

    @torch.inference_mode()
    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """uint8 [num_patches, values_per_patch] on any device -> [num_tokens, output_width]."""
        check_patches(patches, shape, self._tower.values_per_patch)
        return self._tower.forward(patches.to(self._tower.device), self._plan(shape))
