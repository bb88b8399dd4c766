"""What the pooling runner needs of a model that computes one vector of each prompt in one step.

`families` makes them from checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from services.llm.parallel import Shard


@dataclass(frozen=True, slots=True)
class PooledInput:
    """One whole prompt. At its item the token ids are irrelevant."""

    token_ids: Tensor
    """int64 [num_tokens]."""
    patches: Tensor | None
    """uint8 [num_patches, values per patch]; None if the prompt has no item."""


class PoolingModel(Protocol):
    """One rank's share of a model."""

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
    def values_per_patch(self) -> int: ...

    def pool(self, inputs: Sequence[PooledInput]) -> Tensor:
        """Return float32 [len(inputs), n]: probabilities of n labels, or vectors of length 1.

        The prompts have forms that the family allows. Ranks never sum more rows at once than the
        prompts have tokens.
        """
        ...
