"""A vision tower with CUDA graphs: one launch instead of hundreds of small kernels.

A plan depends on the item's shape, so a graph serves one shape and no other with the same number of
patches. The graph is captured when a shape comes for the second time, as images of one size and
pages of one document do. Items of all other shapes run eagerly. This has never run on CUDA.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from compute.cuda_graphs import Captured, GraphPool
from services.vision.eager_tower import EagerTower
from services.vision.tower import Plan, VisionTower, check_patches
from services.vision.tower_thread import ItemShape

MAX_GRAPHS = 8
MAX_REMEMBERED_SHAPES = 256


@dataclass(frozen=True, slots=True)
class ShapeGraph(Generic[Plan]):
    """The graph of one shape, and the memory that it reads."""

    patches: Tensor
    plan: Plan
    captured: Captured


class GraphedTower(Generic[Plan]):
    """Runs any family's tower, by a CUDA graph if the item's shape came before."""

    def __init__(self, tower: VisionTower[Plan]) -> None:
        self._tower = tower
        self._eager = EagerTower(tower)
        self._pool = GraphPool(tower.device)
        self._graphs: OrderedDict[ItemShape, ShapeGraph[Plan]] = OrderedDict()
        self._seen: OrderedDict[ItemShape, None] = OrderedDict()

    @torch.inference_mode()
    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """uint8 [num_patches, values_per_patch] on any device -> [num_tokens, output_width]."""
        if shape not in self._graphs and not self._came_before(shape):
            return self._eager.encode(patches, shape)
        check_patches(patches, shape, self._tower.values_per_patch)
        graph = self._graph(patches, shape)
        # Pinned, so that the host need not wait. torch keeps that memory until the copy is done.
        source = patches.pin_memory() if self._tower.device.type == "cuda" else patches
        graph.patches.copy_(source, non_blocking=True)
        graph.captured.replay()
        return graph.captured.result.clone()

    def _came_before(self, shape: ItemShape) -> bool:
        """Whether an item of this shape came before. Remembers the shape."""
        came_before = shape in self._seen
        self._seen[shape] = None
        self._seen.move_to_end(shape)
        if len(self._seen) > MAX_REMEMBERED_SHAPES:
            self._seen.popitem(last=False)
        return came_before

    def _graph(self, patches: Tensor, shape: ItemShape) -> ShapeGraph[Plan]:
        if shape not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[shape] = self._capture(patches, shape)
        self._graphs.move_to_end(shape)
        return self._graphs[shape]

    def _capture(self, patches: Tensor, shape: ItemShape) -> ShapeGraph[Plan]:
        tower = self._tower
        static = patches.to(tower.device, copy=True)
        plan = tower.plan(shape)
        captured = self._pool.capture(lambda: tower.forward(static, plan))
        return ShapeGraph(static, plan, captured)
