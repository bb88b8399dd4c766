"""The toy family, described without torch."""

from typing import Any

from common.checkpoint import Checkpoint
from common.families import Family, ModelSizes
from common.families.family import TiktokenRules

MODEL_TYPE = "toy"
VOCABULARY_FILE = "toy.tiktoken"
SPECIAL_TOKENS = ("<end>", "<picture>", "<turn>")
LOW_RANK = 4


class Toy(Family):
    """The toy family."""

    model_type = MODEL_TYPE
    title = "Toy"
    vocabulary_file = VOCABULARY_FILE
    tiktoken = TiktokenRules(r"\s?\w+|\s|[^\s\w]+", SPECIAL_TOKENS)
    required_files = ()
    num_position_components = 2
    tower_prefixes = ("eye.",)
    embedding_name = "stem.words"

    def canonical_name(self, name: str) -> str:
        """Files may wrap every name in `toy.`."""
        return name.removeprefix("toy.")

    def sizes(self, checkpoint: Checkpoint) -> ModelSizes:
        given: dict[str, Any] = checkpoint.config
        return ModelSizes(
            vocab_size=given["words"],
            hidden_size=given["width"],
            intermediate_size=given["inner"],
            num_layers=given["blocks"],
            num_heads=given["heads"],
            num_kv_heads=given["key_heads"],
            head_dim=given["head_width"],
        )

    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int:
        return 1 if "norm" in name or "low" in name else world_size

    def patches_per_token(self, checkpoint: Checkpoint) -> int:
        return checkpoint.config["eye"]["patches_per_token"]

    def values_per_patch(self, checkpoint: Checkpoint) -> int:
        return 3 * checkpoint.config["eye"]["patch"] ** 2

    def max_model_len(self, checkpoint: Checkpoint) -> int:
        return checkpoint.config["context"]

    def placeholder_id(self, checkpoint: Checkpoint) -> int | None:
        return checkpoint.config["picture_id"]
