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
    def vision_bytes(self) -> int:
        """The weights of the vision tower, which every replica holds whole."""
        prefixes = self.checkpoint.family.tower_prefixes
        sizes = (size for name, size in self._sizes(False) if name.startswith(prefixes))
        return sum(sizes)

    def rank_bytes(self, world_size: int) -> int:
        """The weights of the language model on one of `world_size` ranks."""
        family = self.checkpoint.family
        sizes = self.checkpoint.sizes
        keeps_quantized = self.keeps_quantized and self.item_bytes < ITEM_BYTES["float32"]
        return sum(
            int(num_bytes // family.num_shares(name, sizes, world_size))
            for name, num_bytes in self._sizes(keeps_quantized)
            if not name.startswith(family.tower_prefixes)
        )

    def kv_bytes_per_token(self, world_size: int) -> int:
        """The keys and values of one token on one of `world_size` ranks."""
        return self.checkpoint.sizes.kv_bytes_per_token(world_size, self.item_bytes)

    def _sizes(self, keeps_quantized: bool) -> Iterator[tuple[str, int]]:
        """Yield the canonical name and the bytes of each tensor that the model needs.

        Quantized weights are one tensor each.
        """
        checkpoint = self.checkpoint
        family = checkpoint.family
        for stored_name, info in checkpoint.tensors.items():
            name = family.canonical_name(stored_name)
            if family.uses(checkpoint, name) and not is_quantized(checkpoint, name):
                yield name, self.item_bytes * prod(info.shape)
        for name, weight in checkpoint.quantized.items():
            dequantized = self.item_bytes * weight.num_weights
            yield name, weight.num_bytes if keeps_quantized else dequantized


def is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor, by its canonical name, is a part of quantized weights."""
    module, _, last = name.rpartition(".")
    return last != "bias" and f"{module}.weight" in checkpoint.quantized


def cache_bytes(card_bytes: int, num_weight_bytes: int) -> int:
    """The bytes of a card that the language service takes for its KV cache by default."""
    return max(0, int(card_bytes * ACCELERATOR_MEMORY_SHARE) - num_weight_bytes)
