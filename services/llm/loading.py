"""Loads one rank's share of a decoder's tensors, whatever a family calls them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import Checkpoint
from common.families import ModelSizes
from compute.linear import Linear
from compute.products import Product, product_of, product_of_parts
from compute.quantized_weights import Weight, padded, with_zeros
from compute.weights import Weights
from services.llm.decoder import LowRank, Projection, SideBySide
from services.llm.parallel import Shard


class Bounds(NamedTuple):
    """The rows of a rank in a tensor of the file."""

    first: int
    last: int
    """The row after the last one."""
    num_zeros: int = 0
    """Rows of zeros that follow them."""

    @property
    def length(self) -> int:
        """The rows that the rank holds, those of zeros included."""
        return self.last - self.first + self.num_zeros


class RankBounds:
    """The rows of a rank. Those of heads are heads * head_dim."""

    def __init__(self, sizes: ModelSizes, shard: Shard) -> None:
        self.sizes = sizes
        self.shard = shard

    @property
    def q_bounds(self) -> Bounds:
        first, last = self.sizes.query_heads(self.shard.rank, self.shard.world_size)
        num_zeros = self.sizes.heads_per_rank(self.shard.world_size) - (last - first)
        return self._rows_of_heads(first, last, num_zeros)

    @property
    def kv_bounds(self) -> Bounds:
        return self._rows_of_heads(*self.shard.split_kv_heads(self.sizes.num_kv_heads))

    @property
    def mlp_bounds(self) -> Bounds:
        return Bounds(*self.shard.split(self.sizes.intermediate_size))

    def _rows_of_heads(self, first: int, last: int, num_zeros: int = 0) -> Bounds:
        return Bounds(*(heads * self.sizes.head_dim for heads in (first, last, num_zeros)))


class ShardLoader(RankBounds):
    """Reads what one rank needs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = Shard(),
        report_loading: Callable[[float], None] = lambda fraction: None,
        quantization: str = "auto",
    ) -> None:
        """Quantized weights stay as they are if `quantization` is "auto".

        Raises BadCheckpoint if the ranks cannot share the model.
        """
        super().__init__(checkpoint.sizes, shard)
        self.sizes.check_fits(shard.world_size)
        self.dtype = dtype
        self.device = device
        self._quantization = quantization
        if self.sizes.only_world_size:
            checkpoint = replace(checkpoint, rank=shard.rank)
        tower = checkpoint.family.tower_prefixes
        self._weights = Weights(checkpoint, lambda name: not name.startswith(tower), report_loading)

    @property
    def num_bytes_read(self) -> int:
        return self._weights.num_bytes_read

    def whole(self, name: str, *shape: int) -> Tensor:
        """Return a tensor that every rank holds whole."""
        return self._weights.tensor(name, shape, self.dtype, self.device)

    def rows(self, name: str, shape: tuple[int, ...], bounds: Bounds) -> Tensor:
        """Return rows (outputs) of a tensor of this shape in the file."""
        return self._part(name, shape, 0, bounds)

    def columns(self, name: str, shape: tuple[int, int], bounds: Bounds) -> Tensor:
        """Return columns (inputs) of a tensor of this shape in the file."""
        return self._part(name, shape, 1, bounds)

    def weight_rows(self, name: str, shape: tuple[int, int], bounds: Bounds) -> Weight:
        """Return rows (outputs) of the weights of a product, as they are stored."""
        return self._weight(name, shape, 0, bounds)

    def weight_columns(self, name: str, shape: tuple[int, int], bounds: Bounds) -> Weight:
        """Return columns (inputs) of the weights of a product, as they are stored."""
        return self._weight(name, shape, 1, bounds)

    def projection(
        self,
        weights: Sequence[Weight],
        bias: Tensor | None = None,
        low_rank: LowRank | SideBySide | None = None,
    ) -> Projection:
        """Return the product with weights whose outputs follow each other."""
        return Projection(product_of_parts(weights, bias, self.dtype, self._quantization), low_rank)

    def vocabulary(
        self, embedding_name: str, head_name: str | None
    ) -> tuple[Callable[[Tensor], Tensor], Product]:
        """Return the lookup of embeddings and the head; without `head_name` they share weights."""
        rows = (self.sizes.vocab_size, self.sizes.hidden_size)
        bounds = Bounds(*self.shard.split(self.sizes.vocab_size))
        embedding = self.rows(embedding_name, rows, bounds)
        if head_name is not None:
            head_rows = self.weight_rows(head_name, rows, bounds)
            return partial(F.embedding, weight=embedding), product_of(head_rows, None, self.dtype)
        head = Linear(embedding)
        if head.packed is None:
            return partial(F.embedding, weight=embedding), head
        # The head's weights are laid out for the kernels. They serve as the embedding, too: a
        # vocabulary is too large to be held twice.
        return head.packed.rows, head

    def _weight(self, name: str, shape: tuple[int, int], dim: int, bounds: Bounds) -> Weight:
        if self._quantization == "auto" and self.dtype is not torch.float32:
            index = (slice(None),) * dim + (slice(bounds.first, bounds.last),)
            part = self._weights.quantized(name, shape, index, self.device)
            if part is not None:
                return with_zeros(part, dim, bounds.num_zeros)
        return self._part(name, shape, dim, bounds)

    def _part(self, name: str, shape: tuple[int, ...], dim: int, bounds: Bounds) -> Tensor:
        first, last, num_zeros = bounds
        if self.sizes.only_world_size:
            shape, first, last = self._in_own_file(shape, dim, first, last)
        part = self._weights.slice(name, shape, dim, first, last, self.dtype, self.device)
        return padded(part, dim, num_zeros)

    def _in_own_file(
        self, shape: tuple[int, ...], dim: int, first: int, last: int
    ) -> tuple[tuple[int, ...], int, int]:
        """Return the shape and the bounds of a part in the rank's own file.

        What ranks share is one block, or several one after the other as in `qkv`. The file has the
        rank's part of each block.
        """
        num_ranks = self.shard.world_size
        length = last - first
        start = first // (length * num_ranks) * length
        own = tuple(size // num_ranks if i == dim else size for i, size in enumerate(shape))
        return own, start, start + length
