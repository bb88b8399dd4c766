"""The vision tower with static shapes: an image is padded to a bucket, what was padded is masked
and dropped.

Every shape depends on the bucket alone, as cards need it for which a tower is compiled beforehand.
Windows are no shapes either: patches stand in window order, so that a patch and all that it attends
to in its window lie within three neighbouring chunks of a window's size, and a mask says which of
them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.buckets import bucket_of
from common.checkpoint import Checkpoint
from compute.kernels.operations import rotate
from services.vision.families.qwen2_5_vl import (
    MAX_CACHED_GRIDS,
    GridPlan,
    VisionTower,
    window_order,
)

PADDING = -1
OUTSIDE = -2


@dataclass(frozen=True, slots=True)
class PaddedPlan(GridPlan):
    """A grid's plan at a bucket's length. Order, inverse and rotations cover the padding, too,
    which stands last."""

    window_mask: Tensor
    """bool [num_chunks, 1, chunk, 3 * chunk]: which of its own and the neighbouring chunks' patches
    a patch attends to."""
    full_mask: Tensor
    """bool [1, 1, 1, length]: what is no padding."""


class StaticVisionTower(VisionTower):
    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        buckets: tuple[int, ...],
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """`buckets` count patches, in rising order."""
        super().__init__(checkpoint, dtype, device, progress)
        self.buckets = buckets
        side = self.config.window_size // self.config.patch_size
        self.chunk = side * side
        """Patches of a whole window."""
        self._padded_plan = lru_cache(MAX_CACHED_GRIDS)(self._make_padded_plan)

    def length_of(self, num_patches: int) -> int:
        """Of the bucket that the image goes into, in whole chunks."""
        bucket = bucket_of(num_patches, self.buckets)
        if not bucket:
            raise ValueError(f"{num_patches} patches fit into none of the buckets {self.buckets}")
        return -(-bucket // self.chunk) * self.chunk

    @torch.inference_mode()
    def encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
        _, height, width = grid_thw
        merge = self.config.spatial_merge_size
        num_patches = len(patches)
        plan = self._padded_plan(height // merge, width // merge)
        padded = F.pad(
            patches.to(self.device), (0, 0, 0, self.length_of(num_patches) - num_patches)
        )
        x = self._embed_patches(padded, plan.order)
        for block in self._blocks:
            x = self._run_block(block, x, plan)
        return self._merge(x).index_select(0, plan.inverse)[: num_patches // self.config.merge_unit]

    def _attend(self, qkv: Tensor, plan: GridPlan, full_attention: bool) -> Tensor:
        assert isinstance(plan, PaddedPlan)
        heads = self.config.num_heads
        dim = self.config.head_dim
        qkv = qkv.view(len(qkv), 3 * heads, dim)
        rotate(qkv, 2 * heads, plan.cos, plan.signed_sin)
        q, k, v = qkv.split(heads, 1)
        if full_attention:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            mask = plan.full_mask
        else:
            q = q.unflatten(0, (-1, self.chunk)).transpose(1, 2)
            k = self._neighbours(k)
            v = self._neighbours(v)
            mask = plan.window_mask
        return (
            F.scaled_dot_product_attention(q, k, v, mask)
            .transpose(1, 2)
            .reshape(len(qkv), heads * dim)
        )

    def _neighbours(self, x: Tensor) -> Tensor:
        """[length, heads, dim] -> [num_chunks, heads, 3 * chunk, dim]: each chunk with the one
        before and the one after."""
        around = F.pad(x, (0, 0, 0, 0, self.chunk, self.chunk))
        return around.unfold(0, 3 * self.chunk, self.chunk).transpose(2, 3)

    def _make_padded_plan(self, height: int, width: int) -> PaddedPlan:
        plan = self._grid_plan(height, width)
        unit = self.config.merge_unit
        num_patches = height * width * unit
        length = self.length_of(num_patches)
        padding = torch.arange(height * width, length // unit, device=self.device)
        cos, sin = (F.pad(x, (0, 0, 0, length - num_patches)) for x in (plan.cos, plan.signed_sin))
        windows = self._window_numbers(height, width, length)
        around = F.pad(windows, (self.chunk, self.chunk), value=OUTSIDE).unfold(
            0, 3 * self.chunk, self.chunk
        )
        window_mask = windows.view(-1, self.chunk, 1) == around[:, None]
        return PaddedPlan(
            torch.cat((plan.order, padding)),
            torch.cat((plan.inverse, padding)),
            plan.windows,
            cos,
            sin,
            window_mask[:, None].to(self.device),
            (windows != PADDING)[None, None, None].to(self.device),
        )

    def _window_numbers(self, height: int, width: int, length: int) -> Tensor:
        """int64 [length]: the window of each patch, in window order."""
        merge = self.config.spatial_merge_size
        unit = self.config.merge_unit
        _, windows = window_order(
            height, width, self.config.window_size // self.config.patch_size // merge
        )
        sizes = torch.tensor([units * unit for count, units in windows for _ in range(count)])
        numbers = torch.arange(len(sizes)).repeat_interleave(sizes)
        return F.pad(numbers, (0, length - len(numbers)), value=PADDING)
