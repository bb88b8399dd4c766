"""A pre-norm decoder: attention with rotary positions and a gated MLP in every layer.

A family loads the weights and brings its rotary tables. It may extend a layer by low-rank pairs for
the rows of items, and scale queries. LoRA adapters add low-rank pairs for the rows of the sequences
that ask for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.families import ModelSizes
from compute.kernels.operations import add_rms_norm, adds_with_norm, rms_norm, silu_mul
from compute.linear import Linear
from compute.products import Product
from services.llm.attention import RotaryTables
from services.llm.batch import Batch
from services.llm.parallel import Shard


class LowRank:
    """x [n, num_inputs] -> x @ down.T @ up.T [n, num_outputs]."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        """Lay out `down` [rank, num_inputs] and `up` [num_outputs, rank]."""
        self.down = Linear(down)
        self.up = Linear(up)

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Pairs of one input, whose outputs stand side by side."""

    pairs: tuple[LowRank, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([pair(x) for pair in self.pairs], -1)


Adapted = tuple[Tensor, LowRank | None]
"""Rows, int64 in rising order, and the pair of an adapter whose result is added on them."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A product, and a low-rank pair whose result is added on the rows of items."""

    product: Product
    low_rank: LowRank | SideBySide | None = None

    def __call__(
        self,
        x: Tensor,
        item_rows: Tensor | None,
        residual: Tensor | None = None,
        adapted: Sequence[Adapted] = (),
    ) -> Tensor:
        y = self.product(x, residual)
        if self.low_rank is not None and item_rows is not None:
            y.index_add_(0, item_rows, self.low_rank(x.index_select(0, item_rows)))
        for rows, pair in adapted:
            if pair is None:
                continue
            if len(rows) == len(x):
                y += pair(x)
            elif len(rows):
                y.index_add_(0, rows, pair(x.index_select(0, rows)))
        return y


@dataclass(frozen=True, slots=True)
class LayerPairs:
    """One rank's share of what an adapter adds to a layer; None where it adds nothing."""

    qkv: LowRank | None = None
    o: LowRank | None = None
    gate_up: LowRank | None = None
    down: LowRank | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One rank's share of a layer."""

    input_norm: Tensor
    qkv: Projection
    """Rows of query heads, then key heads, then value heads."""
    o: Projection
    mlp_norm: Tensor
    gate_up: Projection
    """The first half of the rows is the gate, the second half what the gate multiplies."""
    down: Projection


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """One rank's share of a decoder: of its heads, of its MLP and of the vocabulary's rows."""

    sizes: ModelSizes
    norm_eps: float
    dtype: torch.dtype
    device: torch.device
    shard: Shard
    num_bytes_read: int
    rows_of_vocabulary: Callable[[Tensor], Tensor]
    """int64 [n] rows of this rank's share of the vocabulary -> their embeddings [n, hidden]."""
    layers: list[Layer]
    norm: Tensor
    head: Product
    rotary: Callable[[Batch], RotaryTables]
    """Returns the tables of all tokens. On CUDA it is captured in a graph, so it must not read a
    tensor's values. Blank rows of a graph have rope parameter 0."""
    query_scale: Callable[[Batch], Tensor] | None = None
    """Returns the factor of each token's queries, [T]; None if queries are not scaled."""
    adapters: dict[int, list[LayerPairs]] = field(default_factory=dict)
    """The pairs of each layer, by the number of the adapter in step plans. They come and go."""

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size

    @property
    def input_width(self) -> int:
        return self.sizes.hidden_size

    @property
    def num_local_heads(self) -> int:
        return self.sizes.heads_per_rank(self.shard.world_size)

    @property
    def num_local_kv_heads(self) -> int:
        first, last = self.shard.split_kv_heads(self.sizes.num_kv_heads)
        return last - first

    @property
    def fits_fused_decode(self) -> bool:
        """Whether the kernel that runs all layers at once computes what this decoder computes.

        A class that changes a method is another model.
        """
        return type(self) is Decoder

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        num_kv_heads = self.num_local_kv_heads
        return len(self.layers), 2, num_blocks, block_size, num_kv_heads, self.sizes.head_dim

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden]. Placeholders may lie outside the vocabulary."""
        first, last = self.shard.split(self.sizes.vocab_size)
        local_ids = token_ids - first
        x = self.rows_of_vocabulary(local_ids.clamp(0, last - first - 1))
        if self.shard.world_size == 1:
            return x
        x[(local_ids < 0) | (local_ids >= last - first)] = 0
        return self.shard.all_reduce(x)

    def scale_of(self, batch: Batch) -> Tensor | None:
        """Return the factor of each token's queries in the model's dtype, [T]; None for one."""
        return None if self.query_scale is None else self.query_scale(batch).to(self.dtype)

    def forward(self, x: Tensor, batch: Batch, kv_cache: Tensor) -> Tensor:
        """[T, hidden] -> float32 logits [S, vocab_size]."""
        tables = self.rotary(batch)
        scale = self.scale_of(batch)
        item_rows = batch.item_rows
        next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        normed = rms_norm(x, self.layers[0].input_norm, self.norm_eps)
        for index, (layer, cache) in enumerate(zip(self.layers, kv_cache, strict=True)):
            pairs = [(rows, self.adapters[rows.adapter][index]) for rows in batch.adapters]
            adapted = [(rows.rows, pair) for rows, pair in pairs]
            attended = self._attend(layer, normed, batch, tables, scale, cache, adapted)
            if layer is self.layers[-1]:
                # From here on nothing reads the other rows.
                x = x[batch.sampled_rows]
                attended = attended[batch.sampled_rows]
                item_rows = batch.sampled_item_rows
                adapted = [(rows.sampled_rows, pair) for rows, pair in pairs]
            o = [(rows, pair.o) for rows, pair in adapted]
            x, normed = self._add(x, layer.o, attended, item_rows, o, layer.mlp_norm)
            gate_up = layer.gate_up(
                normed, item_rows, adapted=[(rows, pair.gate_up) for rows, pair in adapted]
            )
            down = [(rows, pair.down) for rows, pair in adapted]
            x, normed = self._add(
                x, layer.down, silu_mul(gate_up), item_rows, down, next_norms[index]
            )
        return self.shard.all_gather(self.head(normed).float())

    def _attend(
        self,
        layer: Layer,
        normed: Tensor,
        batch: Batch,
        tables: RotaryTables,
        scale: Tensor | None,
        cache: Tensor,
        adapted: Sequence[tuple[Tensor, LayerPairs]],
    ) -> Tensor:
        """[T, hidden] -> [T, heads of this rank * head_dim]."""
        assert batch.attention is not None
        num_heads = self.num_local_heads
        num_kv_heads = self.num_local_kv_heads
        qkv = layer.qkv(
            normed, batch.item_rows, adapted=[(rows, pair.qkv) for rows, pair in adapted]
        ).view(len(normed), num_heads + 2 * num_kv_heads, self.sizes.head_dim)
        return batch.attention.run(qkv, num_heads, num_kv_heads, tables, scale, cache)

    def _add(
        self,
        x: Tensor,
        projection: Projection,
        part: Tensor,
        item_rows: Tensor | None,
        adapted: Sequence[Adapted],
        norm: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return x plus the sum of the ranks' products, and the same normalised.

        Our products of a CPU add x themselves. A card adds it together with the norm.
        """
        if self.shard.world_size == 1 and not adds_with_norm(x):
            total = projection(part, item_rows, x, adapted)
            return total, rms_norm(total, norm, self.norm_eps)
        delta = self.shard.all_reduce(projection(part, item_rows, adapted=adapted))
        return add_rms_norm(x, delta, norm, self.norm_eps)


def rotary_tables(angles: Tensor) -> RotaryTables:
    """Return the tables of angles, float32 [T, head_dim / 2].

    Entry i of a head turns together with entry i + head_dim / 2.
    """
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
