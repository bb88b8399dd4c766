"""The vision tower of WeMM-Chat-2k-CN: patches of one image of any shape to embeddings.

Every patch attends to all others. The result is laid out as the grid again, and each square of
4 x 4 patches becomes one embedding. Two learned rows stand around them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from common.families.wemm import (
    NUM_SPLITTERS,
    downsampler_stride,
    grid_of,
    max_aspect,
    max_side,
    num_tokens,
    patch_size,
)
from compute.kernels.operations import gelu, gelu_tanh
from compute.layer_norm import LayerNorm
from compute.linear import Linear
from compute.weights import Weights
from services.vision.attention import TowerAttention
from services.vision.attention_choice import SAMPLE_SIZES, AttentionShapes
from services.vision.tower_thread import ItemShape
from services.vision.windows import attend_masked

MEAN = STD = 0.5
"""Of each channel. The reference has no others."""
ROUNDING = 1e-6
DEFAULT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The sizes of the tower and of the down-sampler behind it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    norm_eps: float
    patch_size: int
    table_side: int
    """The table of positions is a square with this side."""
    stride: int
    """The side of the square of patches that becomes one embedding."""
    depth: int
    """The linear layers of the down-sampler, the convolution included."""
    num_splitters: int
    out_hidden_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "VisionConfig":
        """Raises BadCheckpoint if a value is missing or not supported."""
        try:
            return cls._read(checkpoint)
        except KeyError as e:
            raise BadCheckpoint(f"{checkpoint.path}: config.json lacks {e}") from e

    @classmethod
    def _read(cls, checkpoint: Checkpoint) -> "VisionConfig":
        vision = checkpoint.vision_config
        downsampler = checkpoint.section("downsampler_config")
        stride = downsampler_stride(checkpoint)
        config = cls(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            norm_eps=vision.get("layer_norm_eps", DEFAULT_NORM_EPS),
            patch_size=patch_size(checkpoint),
            table_side=vision["image_size"] // patch_size(checkpoint),
            stride=stride,
            depth=downsampler.get("depth", 2),
            num_splitters=checkpoint.section("spliter_emb_config")["num_embeddings"],
            out_hidden_size=checkpoint.sizes.hidden_size,
        )
        wanted = {
            "hidden_act of vision_config": (vision.get("hidden_act"), "gelu_pytorch_tanh"),
            "num_channels of vision_config": (vision.get("num_channels"), 3),
            "hidden_act of downsampler_config": (downsampler.get("hidden_act"), "gelu"),
            "bias of downsampler_config": (downsampler.get("bias"), False),
            "kernel_size of downsampler_config": (downsampler.get("kernel_size"), stride),
            "visual_hidden_size": (downsampler.get("visual_hidden_size"), config.hidden_size),
            "llm_hidden_size": (downsampler.get("llm_hidden_size"), config.out_hidden_size),
        }
        for name, (found, supported) in wanted.items():
            if found not in (None, supported):
                raise BadCheckpoint(
                    f"{checkpoint.path}: {name} in config.json is {found!r}, supported is "
                    f"{supported!r}"
                )
        if config.num_splitters < NUM_SPLITTERS:
            raise BadCheckpoint(f"{checkpoint.path}: num_embeddings in config.json is less than 2")
        return config


@dataclass(frozen=True, slots=True)
class GridPlan:
    """Everything that depends on an image's shape alone. Padding stands last."""

    inside_rows: Tensor
    """bool [length, patch_size]: the rows of pixels in each patch that have content."""
    inside_columns: Tensor
    """bool [length, patch_size]: the columns of pixels in each patch that have content."""
    position_ids: Tensor
    """int64 [length]: rows of the table of positions."""
    squares: Tensor
    """int64 [num_squares, stride * stride]: the patches that become each embedding."""
    order: Tensor
    """int64 [num_squares + 2]: where each row of the result is among the squares' embeddings, and
    the two learned rows behind them."""
    mask: Tensor | None = None
    """bool [1, 1, 1, length] of a padded plan: False for padding."""
    starts: Tensor | None = None
    """What the attention asks for; None in a padded plan."""


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one transformer block."""

    norm1: LayerNorm
    qkv: Linear
    out: Linear
    norm2: LayerNorm
    fc1: Linear
    fc2: Linear


class WemmVisionTower:
    """Encodes one image at a time. Implements `VisionTower[GridPlan]`."""

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
        self._max_side = max_side(checkpoint)
        self._max_aspect = max_aspect(checkpoint)
        prefixes = checkpoint.family.tower_prefixes
        weights = Weights(checkpoint, lambda name: name.startswith(prefixes), report_loading)
        c = self.config
        self._patch_embed = self._load_patch_embed(weights)
        self._positions = self._load(
            weights,
            "vision_tower.embeddings.position_embedding.weight",
            c.table_side**2,
            c.hidden_size,
        )
        self._blocks = [self._load_block(weights, i) for i in range(c.num_layers)]
        self._post_norm = self._load_norm(weights, "vision_tower.post_layernorm")
        self._group = self._load_group(weights)
        self._linears = [
            Linear(
                self._load(
                    weights,
                    f"downsampler.linear_model.{2 * i + 1}.weight",
                    c.out_hidden_size,
                    c.out_hidden_size,
                )
            )
            for i in range(c.depth - 1)
        ]
        self._splitters = self._load(
            weights, "visual_source_spliter_emb.weight", c.num_splitters, c.out_hidden_size
        )[:NUM_SPLITTERS].clone()

    @property
    def output_width(self) -> int:
        return self.config.out_hidden_size

    @property
    def values_per_patch(self) -> int:
        return 3 * self.config.patch_size**2

    def num_tokens(self, shape: ItemShape) -> int:
        _, rows, columns = shape.grid_thw
        return num_tokens(rows, columns, self.config.stride)

    def padded_length(self, num_patches: int) -> int:
        return num_patches

    def plan(self, shape: ItemShape, length: int | None = None) -> GridPlan:
        patch = self.config.patch_size
        frames, rows, columns = shape.grid_thw
        height, width = shape.content_size
        if frames != 1 or (rows, columns) != grid_of(height, width, patch):
            raise ValueError(f"the grid {shape.grid_thw} is not that of a still image")
        row, column = (x.flatten() for x in grid_indices(rows, columns))
        squares = squares_of(rows, columns, self.config.stride)
        num_squares = len(squares) if length is None else self._max_squares(length)
        padding = 0 if length is None else length - rows * columns
        side = self.config.table_side
        position_ids = buckets(rows, side)[row] * side + buckets(columns, side)[column]
        mask = None
        starts = None
        if length is None:
            starts = self.attention.starts_of(((1, rows * columns),), self.device)
        else:
            mask = (torch.arange(length) < rows * columns)[None, None, None].to(self.device)
        return GridPlan(
            inside_rows=F.pad(inside(row, height, patch), (0, 0, 0, padding)).to(self.device),
            inside_columns=F.pad(inside(column, width, patch), (0, 0, 0, padding)).to(self.device),
            position_ids=F.pad(position_ids, (0, padding)).to(self.device),
            squares=F.pad(squares, (0, 0, 0, num_squares - len(squares))).to(self.device),
            order=order_of(len(squares), num_squares).to(self.device),
            mask=mask,
            starts=starts,
        )

    def attention_shapes(self) -> AttentionShapes:
        patch = self.config.patch_size
        lengths = [(height // patch) * (width // patch) for height, width in SAMPLE_SIZES]
        return AttentionShapes(
            self.config.num_heads,
            self.config.hidden_size // self.config.num_heads,
            {"full": tuple(((1, length),) for length in lengths)},
        )

    def forward(self, patches: Tensor, plan: GridPlan) -> Tensor:
        """uint8 [length, values_per_patch] in raster order -> [num_squares + 2, width]."""
        x = self._embed_patches(patches, plan)
        for block in self._blocks:
            x = self._run_block(block, x, plan)
        x = self._post_norm(x)
        x = self._group(x.index_select(0, plan.squares.flatten()).view(len(plan.squares), -1))
        for linear in self._linears:
            x = linear(gelu(x))
        return torch.cat((x, self._splitters)).index_select(0, plan.order)

    def _embed_patches(self, patches: Tensor, plan: GridPlan) -> Tensor:
        """Pixels beyond the content are 0 after normalising, which no byte can say."""
        size = self.config.patch_size
        pixels = (patches.float() / 255 - MEAN) / STD
        is_inside = torch.logical_and(
            plan.inside_rows[:, None, :, None], plan.inside_columns[:, None, None]
        )
        pixels = pixels.view(-1, 3, size, size) * is_inside
        positions = F.embedding(plan.position_ids, self._positions)
        return self._patch_embed(pixels.flatten(1).to(self.dtype), residual=positions)

    def _run_block(self, block: Block, x: Tensor, plan: GridPlan) -> Tensor:
        heads = self.config.num_heads
        qkv = block.qkv(block.norm1(x)).view(len(x), 3 * heads, -1)
        if plan.mask is None:
            attended = self.attention.full(qkv, heads, ((1, len(x)),), plan.starts)
        else:
            attended = attend_masked(qkv, heads, plan.mask)
        x = block.out(attended, residual=x)
        return block.fc2(gelu_tanh(block.fc1(block.norm2(x))), residual=x)

    def _max_squares(self, num_patches: int) -> int:
        """Return the most squares of a grid with at most this number of patches."""
        stride = self.config.stride
        most = 0
        for rows in range(1, min(num_patches, self._max_side) + 1):
            columns = min(num_patches // rows, self._max_side, self._max_aspect * rows)
            most = max(most, -(-rows // stride) * -(-columns // stride))
        return most

    def _load(self, weights: Weights, name: str, *shape: int) -> Tensor:
        return weights.tensor(name, shape, self.dtype, self.device)

    def _load_norm(self, weights: Weights, name: str) -> LayerNorm:
        size = self.config.hidden_size
        weight, bias = (self._load(weights, f"{name}.{part}", size) for part in ("weight", "bias"))
        return LayerNorm(weight, bias, self.config.norm_eps)

    def _load_linear(self, weights: Weights, rows: int, columns: int, *names: str) -> Linear:
        """Return the product with several weights of these shapes, one below the other."""
        parts = [self._load(weights, f"{name}.weight", rows, columns) for name in names]
        biases = [self._load(weights, f"{name}.bias", rows) for name in names]
        return Linear(torch.cat(parts), torch.cat(biases))

    def _load_patch_embed(self, weights: Weights) -> Linear:
        c = self.config
        name = "vision_tower.embeddings.patch_embedding"
        weight = self._load(weights, f"{name}.weight", c.hidden_size, 3, c.patch_size, c.patch_size)
        return Linear(weight.flatten(1), self._load(weights, f"{name}.bias", c.hidden_size))

    def _load_group(self, weights: Weights) -> Linear:
        """Return the convolution over squares as a product with their patches side by side."""
        c = self.config
        shape = (c.out_hidden_size, c.hidden_size, c.stride, c.stride)
        weight = self._load(weights, "downsampler.group_op.weight", *shape)
        return Linear(weight.permute(0, 2, 3, 1).flatten(1))

    def _load_block(self, weights: Weights, index: int) -> Block:
        size = self.config.hidden_size
        inner = self.config.intermediate_size
        name = f"vision_tower.encoder.layers.{index}"
        own = f"{name}.self_attn"
        return Block(
            norm1=self._load_norm(weights, f"{name}.layer_norm1"),
            qkv=self._load_linear(weights, size, size, *(f"{own}.{part}_proj" for part in "qkv")),
            out=self._load_linear(weights, size, size, f"{own}.out_proj"),
            norm2=self._load_norm(weights, f"{name}.layer_norm2"),
            fc1=self._load_linear(weights, inner, size, f"{name}.mlp.fc1"),
            fc2=self._load_linear(weights, size, inner, f"{name}.mlp.fc2"),
        )


def grid_indices(rows: int, columns: int) -> tuple[Tensor, ...]:
    """Return the row and the column of each cell, int64 [rows, columns] each."""
    return torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")


def buckets(count: int, side: int) -> Tensor:
    """Return which of `side` equal parts of an edge each of `count` patches begins in, int64.

    A patch may begin exactly where a part does. Then rounding decides, so the numbers are float32
    and come about as in the reference, transformers 4.51.3. Version 5 multiplies instead, and
    decides otherwise for some counts.
    """
    begins = torch.arange(0, 1 - ROUNDING, float(1 / torch.tensor(count)))
    borders = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(begins, borders, right=True)


def inside(index: Tensor, length: int, patch: int) -> Tensor:
    """Return which pixels on a side of each patch lie inside `length` pixels, bool [n, patch].

    `index`, int64 [n], is where each patch stands on that side.
    """
    return index[:, None] * patch + torch.arange(patch) < length


def squares_of(rows: int, columns: int, stride: int) -> Tensor:
    """Return the patches of each square of a grid, int64 [num_squares, stride * stride].

    Squares and the patches in them are in raster order. Where a square reaches over the edge, it
    has the patches at the edge again.
    """
    down, right = -(-rows // stride), -(-columns // stride)
    row, column = grid_indices(down * stride, right * stride)
    patches = row.clamp(max=rows - 1) * columns + column.clamp(max=columns - 1)
    return patches.view(down, stride, right, stride).transpose(1, 2).reshape(-1, stride**2)


def order_of(num_squares: int, room: int) -> Tensor:
    """Return the order of the result: the first learned row, the squares, the second learned row.

    The learned rows stand behind the `room` for squares. What is not used comes last.
    """
    rows = torch.cat((torch.tensor([room]), torch.arange(num_squares), torch.tensor([room + 1])))
    return F.pad(rows, (0, room - num_squares))
