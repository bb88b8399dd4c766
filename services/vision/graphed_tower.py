"""The vision tower with CUDA graphs: one launch for hundreds of small kernels.

A grid decides how many windows of which size there are, so a graph serves one grid and no other of
the same number of patches. One is captured when a grid comes for the second time: pictures of one
size, pages of one document. The rest run as they do elsewhere. Untried: no CUDA device was at hand
when it was written.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from compute.cuda_graphs import Captured, GraphPool
from services.vision.families.qwen2_5_vl import GridPlan, VisionTower

MAX_GRAPHS = 8
MAX_REMEMBERED_GRIDS = 256

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class GridGraph:
    patches: Tensor
    """Where the graph reads its input."""
    plan: GridPlan
    """Held here because the graph reads it and the tower keeps only the latest ones."""
    captured: Captured


class GraphedVisionTower(VisionTower):
    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        super().__init__(checkpoint, dtype, device, progress)
        self._pool = GraphPool(device)
        self._graphs: OrderedDict[Grid, GridGraph] = OrderedDict()
        self._seen: OrderedDict[Grid, None] = OrderedDict()

    @torch.inference_mode()
    def encode(self, patches: Tensor, grid_thw: Grid) -> Tensor:
        if grid_thw not in self._graphs and not self._is_known(grid_thw):
            return super().encode(patches, grid_thw)
        graph = self._graph(patches, grid_thw)
        # Pinned, so that the host can go on; torch keeps that memory until the copy is done.
        source = patches.pin_memory() if self.device.type == "cuda" else patches
        graph.patches.copy_(source, non_blocking=True)
        graph.captured.replay()
        return graph.captured.result.clone()

    def _is_known(self, grid_thw: Grid) -> bool:
        """Whether the grid came before; remembers it."""
        is_known = grid_thw in self._seen
        self._seen[grid_thw] = None
        self._seen.move_to_end(grid_thw)
        if len(self._seen) > MAX_REMEMBERED_GRIDS:
            self._seen.popitem(last=False)
        return is_known

    def _graph(self, patches: Tensor, grid_thw: Grid) -> GridGraph:
        if grid_thw not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[grid_thw] = self._capture(patches, grid_thw)
        self._graphs.move_to_end(grid_thw)
        return self._graphs[grid_thw]

    def _capture(self, patches: Tensor, grid_thw: Grid) -> GridGraph:
        _, height, width = grid_thw
        merge = self.config.spatial_merge_size
        plan = self._grid_plan(height // merge, width // merge)
        static = patches.to(self.device, copy=True)
        # By the class's name: `super()` means nothing in a function that is called later.
        captured = self._pool.capture(lambda: VisionTower.encode(self, static, grid_thw))
        return GridGraph(static, plan, captured)
