"""The vision tower of Qwen2.5-VL: patches of one still image to embeddings.

Most blocks attend inside windows of 8 x 8 patches. Windows of equal size are put next to each other
before the first block, so that all of one size are one batched attention; the order is undone after
the merger.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from compute.kernels.operations import attention, rms_norm, rotate, silu_mul
from compute.linear import Linear
from compute.weights import Weights

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
MAX_CACHED_GRIDS = 16
# The published 3B checkpoint leaves these out of its vision_config.
DEFAULTS = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    num_channels: int
    out_hidden_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "VisionConfig":
        given = checkpoint.vision_config
        values: dict[str, Any] = {key: given.get(key, default) for key, default in DEFAULTS.items()}
        values["fullatt_block_indexes"] = tuple(values["fullatt_block_indexes"])
        config = cls(
            num_channels=given.get("in_channels", given.get("in_chans", 3)),
            out_hidden_size=given.get("out_hidden_size", checkpoint.sizes.hidden_size),
            **values,
        )
        if config.out_hidden_size != checkpoint.sizes.hidden_size:
            raise BadCheckpoint(
                f"{checkpoint.path}: out_hidden_size of vision_config is not the language model's "
                "hidden_size"
            )
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one embedding."""
        return self.spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class GridPlan:
    """What depends on an image's grid alone. A unit is a block of 2 x 2 patches, which the merger
    makes one embedding."""

    order: Tensor
    """int64 [num_units]: raster index of the unit at each place; windows of equal size follow each
    other."""
    inverse: Tensor
    """int64 [num_units]: the place of each unit in raster order."""
    windows: tuple[tuple[int, int], ...]
    """(number of windows, patches in each), in order."""
    cos: Tensor
    """float32 [num_patches, head_dim]."""
    signed_sin: Tensor
    """float32 [num_patches, head_dim]: the first half is negated, so that a rotation needs no
    negation."""


@dataclass(frozen=True, slots=True)
class Block:
    full_attention: bool
    norm1: Tensor
    qkv: Linear
    proj: Linear
    norm2: Tensor
    gate_up: Linear
    down: Linear


class VisionTower:
    """Encodes one still image at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self.config = VisionConfig.of(checkpoint)
        self.dtype = dtype
        self.device = device
        tower = checkpoint.family.tower_prefixes
        weights = Weights(checkpoint, lambda name: name.startswith(tower), progress)
        self._mean, self._std = (
            self._per_value(checkpoint.preprocessor_config[key])
            for key in ("image_mean", "image_std")
        )
        self._patch_embed = self._load_patch_embed(weights)
        self._blocks = [self._load_block(weights, i) for i in range(self.config.depth)]
        merged = self.config.hidden_size * self.config.merge_unit
        out = self.config.out_hidden_size
        self._merger_norm = self._load(weights, "merger.ln_q.weight", self.config.hidden_size)
        self._merger_in = Linear(*self._load_linear(weights, "merger.mlp.0", merged, merged))
        self._merger_out = Linear(*self._load_linear(weights, "merger.mlp.2", out, merged))
        self._grid_plan = lru_cache(MAX_CACHED_GRIDS)(self._make_grid_plan)

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings."""
        return self.config.out_hidden_size

    @torch.inference_mode()
    def encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
        """uint8 [num_patches, channels * patch * patch] in merge-block order -> [num_patches / 4,
        hidden_size].

        Patches are neither normalised nor doubled in time.
        """
        frames, height, width = grid_thw
        merge = self.config.spatial_merge_size
        assert frames == 1 and height % merge == 0 and width % merge == 0, (
            f"grid {grid_thw} is not that of a still image"
        )
        assert (
            patches.shape == (height * width, len(self._mean)) and patches.dtype == torch.uint8
        ), patches.shape
        plan = self._grid_plan(height // merge, width // merge)
        x = self._embed_patches(patches.to(self.device), plan.order)
        for block in self._blocks:
            x = self._run_block(block, x, plan)
        return self._merge(x).index_select(0, plan.inverse)

    def _embed_patches(self, patches: Tensor, order: Tensor) -> Tensor:
        ordered = patches.view(len(order), -1).index_select(0, order).view(patches.shape)
        normalised = (ordered.float() / 255 - self._mean) / self._std
        return self._patch_embed(normalised.to(self.dtype))

    def _run_block(self, block: Block, x: Tensor, plan: GridPlan) -> Tensor:
        attended = self._attend(
            block.qkv(rms_norm(x, block.norm1, NORM_EPS)), plan, block.full_attention
        )
        x = block.proj(attended, residual=x)
        return block.down(silu_mul(block.gate_up(rms_norm(x, block.norm2, NORM_EPS))), residual=x)

    def _attend(self, qkv: Tensor, plan: GridPlan, full_attention: bool) -> Tensor:
        """[num_patches, 3 * hidden] -> [num_patches, hidden]."""
        windows = ((1, len(qkv)),) if full_attention else plan.windows
        heads = self.config.num_heads
        dim = self.config.head_dim
        qkv = qkv.view(len(qkv), 3 * heads, dim)
        rotate(qkv, 2 * heads, plan.cos, plan.signed_sin)
        outputs = []
        start = 0
        for count, length in windows:
            stop = start + count * length
            q, k, v = qkv[start:stop].split(heads, 1)
            outputs.append(attention(q, k, v, num_seqs=count))
            start = stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _merge(self, x: Tensor) -> Tensor:
        merged = rms_norm(x, self._merger_norm, NORM_EPS).view(
            -1, self.config.hidden_size * self.config.merge_unit
        )
        return self._merger_out(F.gelu(self._merger_in(merged)))

    def _make_grid_plan(self, height: int, width: int) -> GridPlan:
        """`height` and `width` count units."""
        merge = self.config.spatial_merge_size
        side = self.config.window_size // self.config.patch_size // merge
        order, windows = window_order(height, width, side)
        angles = (
            self._rotary_angles(height, width)
            .view(height * width, self.config.merge_unit, -1)[order]
            .flatten(0, 1)
        )
        cos = angles.cos()
        sin = angles.sin()
        return GridPlan(
            order.to(self.device),
            order.argsort().to(self.device),
            tuple((count, units * self.config.merge_unit) for count, units in windows),
            torch.cat((cos, cos), -1).to(self.device),
            torch.cat((-sin, sin), -1).to(self.device),
        )

    def _rotary_angles(self, height: int, width: int) -> Tensor:
        """float32 [num_patches, head_dim / 2] in merge-block order: the first half turns by the
        row, the second by the column."""
        merge = self.config.spatial_merge_size
        dim = self.config.head_dim // 2
        frequencies = ROPE_THETA ** -(torch.arange(0, dim, 2).float() / dim)
        row, column = torch.meshgrid(
            torch.arange(height * merge), torch.arange(width * merge), indexing="ij"
        )
        blocks = (
            torch.stack((row, column), -1)
            .view(height, merge, width, merge, 2)
            .transpose(1, 2)
            .reshape(-1, 2)
        )
        return (blocks[..., None].float() * frequencies).flatten(1)

    def _per_value(self, per_channel: list[float]) -> Tensor:
        """One number for each value of a patch row."""
        return torch.tensor(per_channel, dtype=torch.float32, device=self.device).repeat_interleave(
            self.config.patch_size**2
        )

    def _load(self, weights: Weights, name: str, *shape: int) -> Tensor:
        return weights.tensor(f"model.visual.{name}", shape, self.dtype, self.device)

    def _load_linear(
        self, weights: Weights, name: str, rows: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        return self._load(weights, f"{name}.weight", rows, columns), self._load(
            weights, f"{name}.bias", rows
        )

    def _load_patch_embed(self, weights: Weights) -> Linear:
        """The temporal taps of the 3-d convolution are summed: a still image is the same frame at
        each of them."""
        c = self.config
        shape = (c.hidden_size, c.num_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        taps = weights.tensor(
            "model.visual.patch_embed.proj.weight", shape, torch.float32, self.device
        )
        return Linear(taps.sum(2).flatten(1).to(self.dtype))

    def _load_block(self, weights: Weights, index: int) -> Block:
        size = self.config.hidden_size
        inner = self.config.intermediate_size
        name = f"blocks.{index}"
        gate = self._load_linear(weights, f"{name}.mlp.gate_proj", inner, size)
        up = self._load_linear(weights, f"{name}.mlp.up_proj", inner, size)
        return Block(
            full_attention=index in self.config.fullatt_block_indexes,
            norm1=self._load(weights, f"{name}.norm1.weight", size),
            qkv=Linear(*self._load_linear(weights, f"{name}.attn.qkv", 3 * size, size)),
            proj=Linear(*self._load_linear(weights, f"{name}.attn.proj", size, size)),
            norm2=self._load(weights, f"{name}.norm2.weight", size),
            gate_up=Linear(torch.cat((gate[0], up[0])), torch.cat((gate[1], up[1]))),
            down=Linear(*self._load_linear(weights, f"{name}.mlp.down_proj", size, inner)),
        )


def window_order(height: int, width: int, side: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """The units of a grid sorted by window, windows by size; and (number of windows, units in each)
    for every size.

    Windows at the right and lower edge are smaller where `side` does not divide the grid: nothing
    is padded.
    """
    units = torch.arange(height * width).view(height, width)
    by_size: dict[int, list[Tensor]] = {}
    for rows in units.split(side):
        for window in rows.split(side, dim=1):
            by_size.setdefault(window.numel(), []).append(window.flatten())
    order = torch.cat([window for same in by_size.values() for window in same])
    return order, [(len(same), size) for size, same in by_size.items()]
