"""Qwen2.5-VL and RolmOCR, described without torch."""

from typing import TYPE_CHECKING, Any

from common.families.family import BadCheckpoint, Family, ModelSizes

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

DEFAULT_MERGE_SIZE = 2


class Qwen25VL(Family):
    """Qwen2.5-VL in its published layout and in the layout of transformers 5."""

    model_type = "qwen2_5_vl"
    title = "Qwen2.5-VL, RolmOCR"
    num_position_components = 3
    tower_prefixes = ("model.visual.",)
    embedding_name = "model.language_model.embed_tokens.weight"

    def canonical_name(self, name: str) -> str:
        """Return the name in the layout of transformers 5.

        Published files say `visual.*` and `model.layers.*`, newer files `model.visual.*` and
        `model.language_model.layers.*`.
        """
        if name.startswith("visual."):
            return "model." + name
        if name.startswith("model.") and not name.startswith(
            ("model.visual.", "model.language_model.")
        ):
            return "model.language_model." + name.removeprefix("model.")
        return name

    def sizes(self, checkpoint: "Checkpoint") -> ModelSizes:
        given = checkpoint.text_config
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "vocab_size",
        )
        if missing := [name for name in names if name not in given]:
            raise BadCheckpoint(f"{checkpoint.path}: config.json lacks {', '.join(missing)}")
        return ModelSizes(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_layers=given["num_hidden_layers"],
            num_heads=given["num_attention_heads"],
            num_kv_heads=given["num_key_value_heads"],
            head_dim=given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
        )

    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int:
        if name.endswith("norm.weight"):
            return 1
        if ".k_proj." in name or ".v_proj." in name:
            return min(world_size, sizes.num_kv_heads)
        return world_size

    def patches_per_token(self, checkpoint: "Checkpoint") -> int:
        return merge_size(checkpoint.vision_config) ** 2

    def max_model_len(self, checkpoint: "Checkpoint") -> int:
        return checkpoint.text_config["max_position_embeddings"]

    def placeholder_id(self, checkpoint: "Checkpoint") -> int | None:
        return checkpoint.config.get("image_token_id")


def merge_size(vision_config: dict[str, Any]) -> int:
    """Return the patches on a side of the square that becomes one embedding."""
    size: int = vision_config.get("spatial_merge_size", DEFAULT_MERGE_SIZE)
    return size
