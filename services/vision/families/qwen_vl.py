"""The vision tower of Qwen-VL: a plain ViT, and a resampler that makes 256 embeddings of any grid.

Every image has the same size, so what depends on its shape is made once, when the tower is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from common.families import qwen_vl as family_rules
from common.families.qwen_vl import NUM_IMAGE_TOKENS
from compute.kernels.operations import attention, gelu
from compute.layer_norm import LayerNorm
from compute.linear import Linear
from compute.weights import Weights
from services.vision.attention import TowerAttention
from services.vision.attention_choice import SAMPLE_SIZES, AttentionShapes
from services.vision.tower_thread import ItemShape

PREFIX = "transformer.visual"
NORM_EPS = 1e-6
POOL_HEAD_DIM = 128
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
STORED_SIDE = 16
"""The tables of positions are stored for a grid of 16 x 16 patches, and enlarged."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The sizes of the tower, by their names in `visual`."""

    width: int
    layers: int
    heads: int
    inner: int
    """The width between the layers of the MLP, as `mlp_ratio` says."""
    output_dim: int
    patch_size: int
    side: int
    """The patches on a side of an image."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "VisionConfig":
        """Read the sizes. Raises BadCheckpoint if they do not fit each other."""
        width, layers, heads, output_dim = (
            family_rules.visual_size(checkpoint, name)
            for name in ("width", "layers", "heads", "output_dim")
        )
        if output_dim != checkpoint.sizes.hidden_size:
            raise BadCheckpoint(
                f"{checkpoint.path}: output_dim of visual is not the language model's hidden_size"
            )
        if width % heads or output_dim % POOL_HEAD_DIM:
            raise BadCheckpoint(
                f"{checkpoint.path}: width of visual is not a multiple of its heads, or output_dim "
                f"not one of {POOL_HEAD_DIM}"
            )
        return cls(
            width=width,
            layers=layers,
            heads=heads,
            inner=int(width * checkpoint.vision_config.get("mlp_ratio", 4.0)),
            output_dim=output_dim,
            patch_size=family_rules.patch_size(checkpoint),
            side=family_rules.grid_side(checkpoint),
        )

    @property
    def num_patches(self) -> int:
        return self.side**2


@dataclass(frozen=True, slots=True)
class SquarePlan:
    """What a length decides. In a padded plan the padding stands last."""

    visible: Tensor | None = None
    """bool [1, length]: False for padding; None if there is none."""
    starts: Tensor | None = None
    """What the attention asks for if there is no padding."""


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one transformer block."""

    norm1: LayerNorm
    qkv: Linear
    """Its rows are those of all queries, then keys, then values."""
    proj: Linear
    norm2: LayerNorm
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Resampler:
    """The weights of the attention by which 256 learned queries read all patches."""

    input: Linear | None
    """None if patches and embeddings have one width."""
    norm: LayerNorm
    queries: Tensor
    """[256, output_dim]: projected, as they do not depend on the image."""
    k: Linear
    v: Linear
    out: Linear
    norm_post: LayerNorm
    proj: Linear


class QwenVisionTower:
    """Encodes one image at a time. Implements `VisionTower[SquarePlan]`."""

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
        loader = TowerLoader(self.config, checkpoint, dtype, device, report_loading)
        self._mean, self._std = (self._per_value(values) for values in (IMAGE_MEAN, IMAGE_STD))
        self._patch_embed = loader.patch_embed()
        self._positions = loader.positions("positional_embedding", self.config.width)
        self._norm_pre = loader.norm("ln_pre", self.config.width)
        self._blocks = [loader.block(i) for i in range(self.config.layers)]
        self._key_positions = loader.positions("attn_pool.pos_embed", self.output_width)
        self._resampler = loader.resampler()

    @property
    def output_width(self) -> int:
        return self.config.output_dim

    @property
    def values_per_patch(self) -> int:
        """The number of bytes in a patch as it arrives."""
        return len(self._mean)

    def num_tokens(self, shape: ItemShape) -> int:
        return NUM_IMAGE_TOKENS

    def padded_length(self, num_patches: int) -> int:
        return num_patches

    def plan(self, shape: ItemShape, length: int | None = None) -> SquarePlan:
        side = self.config.side
        if shape.grid_thw != (1, side, side):
            raise ValueError(f"an image has {side} x {side} patches, not {shape.grid_thw}")
        num_patches = self.config.num_patches
        if length in (None, num_patches):
            starts = self.attention.starts_of(((1, num_patches),), self.device)
            return SquarePlan(starts=starts)
        return SquarePlan((torch.arange(length, device=self.device) < num_patches)[None])

    def attention_shapes(self) -> AttentionShapes:
        return AttentionShapes(
            self.config.heads,
            self.config.width // self.config.heads,
            {"full": (((1, self.config.num_patches),),) * len(SAMPLE_SIZES)},
        )

    def forward(self, patches: Tensor, plan: SquarePlan) -> Tensor:
        """uint8 [length, values_per_patch] in raster order -> [256, output_width]."""
        normalised = (patches.float() / 255 - self._mean) / self._std
        x = self._patch_embed(normalised.to(self.dtype))
        x = self._norm_pre(x + self._padded(self._positions, len(x)))
        for block in self._blocks:
            x = self._run_block(block, x, plan)
        return self._resample(x, plan)

    def _run_block(self, block: Block, x: Tensor, plan: SquarePlan) -> Tensor:
        heads = self.config.heads
        qkv = block.qkv(block.norm1(x)).view(len(x), 3 * heads, -1)
        if plan.visible is None:
            attended = self.attention.full(qkv, heads, ((1, len(x)),), plan.starts)
        else:
            q, k, v = qkv.split(heads, 1)
            attended = attention(q, k, v, visible=plan.visible)
        x = block.proj(attended, residual=x)
        return block.down(gelu(block.up(block.norm2(x))), residual=x)

    def _resample(self, x: Tensor, plan: SquarePlan) -> Tensor:
        """[length, width] -> [256, output_width]."""
        pool = self._resampler
        x = pool.norm(x if pool.input is None else pool.input(x))
        positions = self._padded(self._key_positions, len(x))
        q, k, v = (
            rows.view(len(rows), -1, POOL_HEAD_DIM)
            for rows in (pool.queries, pool.k(x + positions), pool.v(x))
        )
        return pool.proj(pool.norm_post(pool.out(attention(q, k, v, visible=plan.visible))))

    def _padded(self, table: Tensor, length: int) -> Tensor:
        """[num_patches, width] -> [length, width], with rows of zeros for padding."""
        return F.pad(table, (0, 0, 0, length - len(table))) if length > len(table) else table

    def _per_value(self, per_channel: tuple[float, ...]) -> Tensor:
        """Repeat a number per channel for every value of a patch."""
        values = torch.tensor(per_channel, dtype=torch.float32, device=self.device)
        return values.repeat_interleave(self.config.patch_size**2)


class TowerLoader:
    """Reads the weights of the tower."""

    def __init__(
        self,
        config: VisionConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        report_loading: Callable[[float], None],
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        prefixes = checkpoint.family.tower_prefixes
        self._weights = Weights(checkpoint, lambda name: name.startswith(prefixes), report_loading)

    def _load(self, name: str, *shape: int) -> Tensor:
        return self._weights.tensor(f"{PREFIX}.{name}", shape, self._dtype, self._device)

    def norm(self, name: str, width: int) -> LayerNorm:
        weight, bias = (self._load(f"{name}.{part}", width) for part in ("weight", "bias"))
        return LayerNorm(weight, bias, NORM_EPS)

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        return Linear(self._load(f"{name}.weight", rows, columns), self._load(f"{name}.bias", rows))

    def patch_embed(self) -> Linear:
        """Return the convolution as a product: its windows do not overlap."""
        patch = self._config.patch_size
        return Linear(self._load("conv1.weight", self._config.width, 3, patch, patch).flatten(1))

    def positions(self, name: str, width: int) -> Tensor:
        """Return a table of positions for the grid of an image: [num_patches, width]."""
        table = self._weights.tensor(
            f"{PREFIX}.{name}", (STORED_SIDE**2, width), torch.float32, self._device
        )
        return enlarged(table, self._config.side).to(self._dtype)

    def block(self, index: int) -> Block:
        width = self._config.width
        inner = self._config.inner
        name = f"transformer.resblocks.{index}"
        return Block(
            norm1=self.norm(f"{name}.ln_1", width),
            qkv=self.qkv(f"{name}.attn.in_proj"),
            proj=self.linear(f"{name}.attn.out_proj", width, width),
            norm2=self.norm(f"{name}.ln_2", width),
            up=self.linear(f"{name}.mlp.c_fc", inner, width),
            down=self.linear(f"{name}.mlp.c_proj", width, inner),
        )

    def qkv(self, name: str) -> Linear:
        """Return a projection whose rows are stored head by head: query, key and value of each."""
        width = self._config.width
        weight = self._load(f"{name}.weight", 3 * width, width)
        bias = self._load(f"{name}.bias", 3 * width)
        weight, bias = (
            x.unflatten(0, (self._config.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            for x in (weight, bias)
        )
        return Linear(weight, bias)

    def resampler(self) -> Resampler:
        width = self._config.output_dim
        name = "attn_pool"
        has_input = self._config.width != width
        weights = self._load(f"{name}.attn.in_proj_weight", 3 * width, width).chunk(3)
        biases = self._load(f"{name}.attn.in_proj_bias", 3 * width).chunk(3)
        return Resampler(
            input=Linear(self._load(f"{name}.kv_proj.weight", width, self._config.width))
            if has_input
            else None,
            norm=self.norm(f"{name}.ln_kv", width),
            queries=F.linear(self.queries(name), weights[0], biases[0]),
            k=Linear(weights[1], biases[1]),
            v=Linear(weights[2], biases[2]),
            out=self.linear(f"{name}.attn.out_proj", width, width),
            norm_post=self.norm("ln_post", width),
            proj=Linear(self._load("proj", width, width).T.contiguous()),
        )

    def queries(self, name: str) -> Tensor:
        """Return the learned queries with their positions, [256, output_dim]."""
        width = self._config.output_dim
        queries = self._load(f"{name}.query", NUM_IMAGE_TOKENS, width)
        positions = self._load(f"{name}.pos_embed", NUM_IMAGE_TOKENS, width)
        return self.norm(f"{name}.ln_q", width)(queries) + positions


def enlarged(table: Tensor, side: int) -> Tensor:
    """Return a table of positions of a square grid, float32 [n, width], for side x side patches."""
    if len(table) == side**2:
        return table
    grid = table.view(1, STORED_SIDE, STORED_SIDE, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.contiguous()
