"""The vision tower of Qwen2.5-VL: patches of one image or video to embeddings.

Most blocks attend inside windows of 8 x 8 patches. Patches are sorted by window before the first
block, and their order is restored after the merger. A step in time of a video, which is two frames,
attends to itself only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from compute.kernels.operations import rms_norm, rotate, silu_mul
from compute.linear import Linear
from compute.weights import Weights
from services.vision.attention import TowerAttention
from services.vision.attention_choice import SAMPLE_SIZES, AttentionShapes
from services.vision.tower_thread import ItemShape
from services.vision.windows import (
    attend_masked,
    attend_to_chunks,
    chunk_mask,
    step_mask,
    window_numbers,
    window_order,
)

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
ALIGNED_INPUTS = 8
"""Rows of a multiple of 8 values in half precision begin at 16 bytes, as the fast products of a
card need it. The published towers have 3,420 values between the products of an MLP."""
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
    """The sizes of the tower, by their names in `vision_config`."""

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
        """Read the sizes. Raises BadCheckpoint if the language model has another width."""
        given = checkpoint.vision_config
        values: dict[str, Any] = {key: given.get(key, default) for key, default in DEFAULTS.items()}
        values["fullatt_block_indexes"] = tuple(values["fullatt_block_indexes"])
        config = cls(
            num_channels=given.get("in_channels") or given.get("in_chans") or 3,
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
        """The number of patches that become one embedding."""
        return self.spatial_merge_size**2

    @property
    def window_patches(self) -> int:
        """The number of patches in a whole window."""
        return (self.window_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class GridPlan:
    """Everything that depends on an item's grid alone.

    A unit is a square of 2 x 2 patches, which the merger turns into one embedding. In a padded plan
    the padding stands last.
    """

    order: Tensor
    """int64 [num_units]: the raster index of each unit, sorted by step and by window."""
    inverse: Tensor
    """int64 [num_units]: the place of each unit in raster order."""
    cos: Tensor
    """float32 [num_patches, head_dim]."""
    signed_sin: Tensor
    """float32 [num_patches, head_dim]. The first half is negated, which saves a negation."""
    windows: tuple[tuple[int, int], ...]
    """(number of windows, patches in each), in order. Empty in a padded plan."""
    steps: tuple[tuple[int, int], ...]
    """(number of steps in time, patches in each). Empty in a padded plan."""
    window_starts: Tensor | None = None
    """What the attention in windows asks for; None in a padded plan."""
    step_starts: Tensor | None = None
    """What the attention in steps asks for; None in a padded plan."""
    window_mask: Tensor | None = None
    """bool [num_chunks, 1, chunk, 3 * chunk] of a padded plan: see `chunk_mask`."""
    full_mask: Tensor | None = None
    """bool [1, 1, 1, length] of a padded plan: False for padding. If there are several steps in
    time, bool [1, 1, length, length]: True for patches of the same step."""


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one transformer block."""

    full_attention: bool
    norm1: Tensor
    qkv: Linear
    proj: Linear
    norm2: Tensor
    gate_up: Linear
    down: Linear


class Qwen25VisionTower:
    """Encodes one image or video at a time. Implements `VisionTower[GridPlan]`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        report_loading: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """Load the weights. `report_loading` is called with the fraction that is loaded."""
        self.config = VisionConfig.of(checkpoint)
        self.dtype = dtype
        self.device = device
        self.attention = TowerAttention()
        prefixes = checkpoint.family.tower_prefixes
        weights = Weights(checkpoint, lambda name: name.startswith(prefixes), report_loading)
        self._mean, self._std = (
            self._per_value(checkpoint.preprocessor_config[key])
            for key in ("image_mean", "image_std")
        )
        taps = self._load_patch_embed(weights)
        # A still image is the same frame at each of the temporal taps.
        self._embed_image = Linear(taps.sum(2).flatten(1).to(dtype))
        self._embed_video = Linear(taps.flatten(1).to(dtype))
        self._blocks = [self._load_block(weights, i) for i in range(self.config.depth)]
        merged = self.config.hidden_size * self.config.merge_unit
        out = self.config.out_hidden_size
        self._merger_norm = self._load(weights, "merger.ln_q.weight", self.config.hidden_size)
        self._merger_in = Linear(*self._load_linear(weights, "merger.mlp.0", merged, merged))
        self._merger_out = Linear(*self._load_linear(weights, "merger.mlp.2", out, merged))

    @property
    def output_width(self) -> int:
        return self.config.out_hidden_size

    @property
    def values_per_patch(self) -> int:
        """The number of bytes in a patch of an image."""
        return len(self._mean)

    def num_tokens(self, shape: ItemShape) -> int:
        return prod(shape.grid_thw) // self.config.merge_unit

    def padded_length(self, num_patches: int) -> int:
        """Return a length of whole windows."""
        chunk = self.config.window_patches
        return -(-num_patches // chunk) * chunk

    def plan(self, shape: ItemShape, length: int | None = None) -> GridPlan:
        steps, height, width = shape.grid_thw
        merge = self.config.spatial_merge_size
        if height % merge or width % merge or (steps != 1 and shape.kind == "image"):
            name = {"image": "a still image", "video": "a video"}[shape.kind]
            raise ValueError(f"the grid {shape.grid_thw} is not that of {name}")
        plan = self._grid_plan(steps, height // merge, width // merge)
        return plan if length is None else self._padded(plan, length)

    def attention_shapes(self) -> AttentionShapes:
        unit = self.config.patch_size * self.config.spatial_merge_size
        plans = [
            self._grid_plan(1, height // unit, width // unit) for height, width in SAMPLE_SIZES
        ]
        return AttentionShapes(
            self.config.num_heads,
            self.config.head_dim,
            {
                "windowed": tuple(plan.windows for plan in plans),
                "full": tuple(plan.steps for plan in plans),
            },
        )

    def forward(self, patches: Tensor, plan: GridPlan) -> Tensor:
        """uint8 [num_patches, values] in merge-block order -> [num_units, width]."""
        x = self._embed_patches(patches, plan.order)
        for block in self._blocks:
            x = self._run_block(block, x, plan)
        return self._merge(x).index_select(0, plan.inverse)

    def _embed_patches(self, patches: Tensor, order: Tensor) -> Tensor:
        ordered = patches.view(len(order), -1).index_select(0, order).view(patches.shape)
        num_frames = patches.shape[1] // self.values_per_patch
        if num_frames == 1:
            normalised = (ordered.float() / 255 - self._mean) / self._std
            return self._embed_image(normalised.to(self.dtype))
        # The values of a patch are ordered by (channel, frame, y, x).
        channels = ordered.view(len(patches), self.config.num_channels, num_frames, -1)
        mean, std = (x.view(self.config.num_channels, 1, -1) for x in (self._mean, self._std))
        normalised = ((channels.float() / 255 - mean) / std).flatten(1)
        return self._embed_video(normalised.to(self.dtype))

    def _run_block(self, block: Block, x: Tensor, plan: GridPlan) -> Tensor:
        attended = self._attend(
            block.qkv(rms_norm(x, block.norm1, NORM_EPS)), plan, block.full_attention
        )
        x = block.proj(attended, residual=x)
        return block.down(silu_mul(block.gate_up(rms_norm(x, block.norm2, NORM_EPS))), residual=x)

    def _attend(self, qkv: Tensor, plan: GridPlan, full_attention: bool) -> Tensor:
        """[num_patches, 3 * hidden] -> [num_patches, hidden]."""
        heads = self.config.num_heads
        qkv = qkv.view(len(qkv), 3 * heads, self.config.head_dim)
        rotate(qkv, 2 * heads, plan.cos, plan.signed_sin)
        mask = plan.full_mask if full_attention else plan.window_mask
        if mask is None:
            if full_attention:
                return self.attention.full(qkv, heads, plan.steps, plan.step_starts)
            return self.attention.windowed(qkv, heads, plan.windows, plan.window_starts)
        if full_attention:
            return attend_masked(qkv, heads, mask)
        return attend_to_chunks(qkv, heads, mask)

    def _merge(self, x: Tensor) -> Tensor:
        merged = rms_norm(x, self._merger_norm, NORM_EPS).view(
            -1, self.config.hidden_size * self.config.merge_unit
        )
        return self._merger_out(F.gelu(self._merger_in(merged)))

    def _grid_plan(self, steps: int, height: int, width: int) -> GridPlan:
        """Return the plan of a grid of `steps` x `height` x `width` units."""
        unit = self.config.merge_unit
        side = self.config.window_size // self.config.patch_size // self.config.spatial_merge_size
        units = height * width
        order, windows = window_order(height, width, side)
        angles = self._rotary_angles(height, width)
        angles = angles.view(units, unit, -1)[order].flatten(0, 1).repeat(steps, 1)
        order = (units * torch.arange(steps)[:, None] + order).flatten()
        cos = angles.cos()
        sin = angles.sin()
        groups = tuple((count, size * unit) for count, size in windows) * steps
        whole = ((steps, units * unit),)
        return GridPlan(
            order=order.to(self.device),
            inverse=order.argsort().to(self.device),
            cos=torch.cat((cos, cos), -1).to(self.device),
            signed_sin=torch.cat((-sin, sin), -1).to(self.device),
            windows=groups,
            steps=whole,
            window_starts=self.attention.starts_of(groups, self.device),
            step_starts=self.attention.starts_of(whole, self.device),
        )

    def _padded(self, plan: GridPlan, length: int) -> GridPlan:
        """Return the plan with room for `length` patches, in which no item attends to padding."""
        unit = self.config.merge_unit
        padding = torch.arange(len(plan.order), length // unit, device=self.device)
        rows = length - len(plan.cos)
        numbers = window_numbers(plan.windows, length)
        return replace(
            plan,
            order=torch.cat((plan.order, padding)),
            inverse=torch.cat((plan.inverse, padding)),
            cos=F.pad(plan.cos, (0, 0, 0, rows)),
            signed_sin=F.pad(plan.signed_sin, (0, 0, 0, rows)),
            windows=(),
            steps=(),
            window_starts=None,
            step_starts=None,
            window_mask=chunk_mask(numbers, self.config.window_patches).to(self.device),
            full_mask=step_mask(window_numbers(plan.steps, length)).to(self.device),
        )

    def _rotary_angles(self, height: int, width: int) -> Tensor:
        """Return float32 [num_patches, head_dim / 2] in merge-block order.

        The first half turns by the row of a patch, the second by its column.
        """
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
        """Repeat a number per channel for every value of a patch."""
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

    def _load_patch_embed(self, weights: Weights) -> Tensor:
        """Return the weights of the 3-d convolution, [hidden, channels, frames, patch, patch]."""
        c = self.config
        shape = (c.hidden_size, c.num_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        name = "model.visual.patch_embed.proj.weight"
        return weights.tensor(name, shape, torch.float32, self.device)

    def _load_block(self, weights: Weights, index: int) -> Block:
        size = self.config.hidden_size
        inner = self.config.intermediate_size
        name = f"blocks.{index}"
        gate = self._load_linear(weights, f"{name}.mlp.gate_proj", inner, size)
        up = self._load_linear(weights, f"{name}.mlp.up_proj", inner, size)
        down, down_bias = self._load_linear(weights, f"{name}.mlp.down_proj", size, inner)
        # A gate of zero times zero adds nothing.
        added = mlp_padding(inner, self.device)
        gate, up = ((F.pad(w, (0, 0, 0, added)), F.pad(b, (0, added))) for w, b in (gate, up))
        return Block(
            full_attention=index in self.config.fullatt_block_indexes,
            norm1=self._load(weights, f"{name}.norm1.weight", size),
            qkv=Linear(*self._load_linear(weights, f"{name}.attn.qkv", 3 * size, size)),
            proj=Linear(*self._load_linear(weights, f"{name}.attn.proj", size, size)),
            norm2=self._load(weights, f"{name}.norm2.weight", size),
            gate_up=Linear(torch.cat((gate[0], up[0])), torch.cat((gate[1], up[1]))),
            down=Linear(F.pad(down, (0, added)), down_bias),
        )


def mlp_padding(num_values: int, device: torch.device) -> int:
    """Return how many zeros a card gets between the products of an MLP."""
    return -num_values % ALIGNED_INPUTS if device.type == "cuda" else 0
