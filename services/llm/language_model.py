"""What the model runner needs of a language model. `families` makes them from checkpoints."""

from typing import Protocol

import torch
from torch import Tensor

from services.llm.batch import Batch
from services.llm.parallel import Shard


class LanguageModel(Protocol):
    """One rank's share of a language model."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def shard(self) -> Shard: ...

    @property
    def num_bytes_read(self) -> int:
        """The bytes of the checkpoint that this rank has read."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def input_width(self) -> int:
        """The width of its inputs, and so of the embeddings of items."""
        ...

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Return [num_layers, 2, num_blocks, block_size, key heads of this rank, head_dim]."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, input_width]. Placeholders may lie outside the vocabulary."""
        ...

    def forward(self, x: Tensor, batch: Batch, kv_cache: Tensor) -> Tensor:
        """[T, input_width] -> float32 logits [S, vocab_size] of the sampled rows."""
        ...
