"""How many bytes a model takes, and over how many ranks it can be split. Imports no torch."""

from dataclasses import dataclass
from math import prod

from common.checkpoint import BadCheckpoint, Checkpoint, canonical_name

TP_SIZES = (1, 2, 4, 8)
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ACCELERATOR_MEMORY_SHARE = 0.8
"""What an accelerator has beside this is for activations, graphs, and a process beside this one."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint; `kv_bytes_per_token` and `rank_bytes` are those of one tensor-parallel
    rank."""

    checkpoint: Checkpoint
    item_bytes: int

    @property
    def vision_bytes(self) -> int:
        """Of the vision tower's weights, which every replica has whole."""
        return self.item_bytes * sum(
            prod(shape) for name, shape in self._shapes() if name.startswith("model.visual.")
        )

    def rank_bytes(self, world_size: int) -> int:
        """Of a rank's share of the language model: it has norms whole, and its own part of
        everything else."""
        return self.item_bytes * sum(
            prod(shape) // self._parts(name, world_size)
            for name, shape in self._shapes()
            if not name.startswith("model.visual.")
        )

    def kv_bytes_per_token(self, world_size: int) -> int:
        given = self._given
        head_dim = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
        return (
            2
            * given["num_hidden_layers"]
            * max(given["num_key_value_heads"] // world_size, 1)
            * head_dim
            * self.item_bytes
        )

    def fits(self, world_size: int) -> bool:
        given = self._given
        whole = (given["num_attention_heads"], given["intermediate_size"], given["vocab_size"])
        return is_divisible(whole, given["num_key_value_heads"], world_size)

    @property
    def _given(self) -> dict[str, int]:
        given = self.checkpoint.text_config
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "vocab_size",
        )
        if missing := [name for name in names if name not in given]:
            raise BadCheckpoint(f"{self.checkpoint.path}: config.json lacks {', '.join(missing)}")
        return given

    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [
            (canonical_name(name), info.shape) for name, info in self.checkpoint.tensors.items()
        ]

    def _parts(self, name: str, world_size: int) -> int:
        if name.endswith("norm.weight"):
            return 1
        if ".k_proj." in name or ".v_proj." in name:
            return min(world_size, self._given["num_key_value_heads"])
        return world_size


def is_divisible(counts: tuple[int, ...], num_kv_heads: int, world_size: int) -> bool:
    """Whether ranks can share so many heads, columns and rows. Key heads are replicated where there
    are fewer than ranks."""
    kv_fit = num_kv_heads % world_size == 0 or world_size % num_kv_heads == 0
    return kv_fit and not any(count % world_size for count in counts)


def cache_bytes(card_bytes: int, num_weight_bytes: int) -> int:
    """What the language service takes by default of a card for its KV cache."""
    return max(0, int(card_bytes * ACCELERATOR_MEMORY_SHARE) - num_weight_bytes)
