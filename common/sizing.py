"""How many bytes a model takes on a card. Imports no torch."""

from collections.abc import Iterator
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
    keeps_quantized: bool = True
    """Whether quantized weights of the language model stay as they are stored. In float32 they are
    always dequantized, as those of the vision tower are."""

    @property
    def is_quantized(self) -> bool:
        """Whether quantized weights take fewer bytes than `item_bytes` each."""
        is_float32 = self.item_bytes == ITEM_BYTES["float32"]
        return self.keeps_quantized and not is_float32 and bool(self.checkpoint.quantized)

    @property
    def vision_bytes(self) -> int:
        """The weights of the vision tower, which every replica holds whole."""
        prefixes = self.checkpoint.family.tower_prefixes
        sizes = (size for name, size in self._sizes(False) if name.startswith(prefixes))
        return sum(sizes)

    def rank_bytes(self, world_size: int) -> int:
        """The weights of the language model on one of `world_size` ranks."""
        family = self.checkpoint.family
        sizes = self.checkpoint.sizes
        return sum(
            int(num_bytes // family.num_shares(name, sizes, world_size))
            for name, num_bytes in self._sizes(self.is_quantized)
            if not name.startswith(family.tower_prefixes)
        )

    def kv_bytes_per_token(self, world_size: int) -> int:
        """The keys and values of one token on one of `world_size` ranks."""
        return self.checkpoint.sizes.kv_bytes_per_token(world_size, self.item_bytes)

    def _sizes(self, keeps_quantized: bool) -> Iterator[tuple[str, int]]:
        """Yield the canonical name and the bytes of each tensor that the model needs."""
        checkpoint = self.checkpoint
        quantized = checkpoint.quantized if keeps_quantized else {}
        for name, shape in checkpoint.shapes.items():
            if name in quantized:
                yield name, quantized[name].num_bytes
            elif checkpoint.family.uses(checkpoint, name):
                yield name, self.item_bytes * prod(shape)


def cache_bytes(card_bytes: int, num_weight_bytes: int) -> int:
    """The bytes of a card that the language service takes for its KV cache by default."""
    return max(0, int(card_bytes * ACCELERATOR_MEMORY_SHARE) - num_weight_bytes)
