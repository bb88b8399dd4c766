"""How many bytes a model takes on a card. Imports no torch."""

from dataclasses import dataclass
from math import prod

from common.checkpoint import Checkpoint

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ACCELERATOR_MEMORY_SHARE = 0.8
"""The share of an accelerator's memory that weights and KV cache may take. The rest is for
activations, graphs and another process on the same card."""


@dataclass(frozen=True)
class Footprint:
    """The bytes that a checkpoint takes if each element takes `item_bytes`."""

    checkpoint: Checkpoint
    item_bytes: int

    @property
    def vision_bytes(self) -> int:
        """The weights of the vision tower, which every replica holds whole."""
        prefixes = self.checkpoint.family.tower_prefixes
        return self.item_bytes * sum(
            prod(shape) for name, shape in self._shapes() if name.startswith(prefixes)
        )

    def rank_bytes(self, world_size: int) -> int:
        """The weights of the language model on one of `world_size` ranks."""
        family = self.checkpoint.family
        sizes = self.checkpoint.sizes
        return self.item_bytes * sum(
            int(prod(shape) // family.num_shares(name, sizes, world_size))
            for name, shape in self._shapes()
            if not name.startswith(family.tower_prefixes)
        )

    def kv_bytes_per_token(self, world_size: int) -> int:
        """The keys and values of one token on one of `world_size` ranks."""
        return self.checkpoint.sizes.kv_bytes_per_token(world_size, self.item_bytes)

    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """The canonical name and the shape of every tensor that the model needs."""
        checkpoint = self.checkpoint
        family = checkpoint.family
        named = ((family.canonical_name(n), info.shape) for n, info in checkpoint.tensors.items())
        return [(name, shape) for name, shape in named if family.uses(checkpoint, name)]


def cache_bytes(card_bytes: int, num_weight_bytes: int) -> int:
    """The bytes of a card that the language service takes for its KV cache by default."""
    return max(0, int(card_bytes * ACCELERATOR_MEMORY_SHARE) - num_weight_bytes)
