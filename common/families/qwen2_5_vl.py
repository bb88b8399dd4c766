"""Qwen2.5-VL and RolmOCR, described without torch."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.families.family import Family, ModelSizes, RequestDefaults, sizes_of
from common.messages import ItemKind, Repetition

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

DEFAULT_PATCH_SIZE = 14
DEFAULT_MERGE_SIZE = 2
# The limits of the family's image processor if preprocessor_config.json names none.
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280
MAX_ASPECT_RATIO = 200
MAX_VIDEO_TOKENS = 16384
"""The most tokens of a video: those of the largest image that published checkpoints allow."""
MAX_CONTEXT_SHARE = 0.9
"""The most that a video takes of the context."""
DEFAULT_TEMPORAL_PATCH_SIZE = 2
DEFAULT_TOKENS_PER_SECOND = 4


HEAD = "lm_head.weight"
PAGE_LOOPS = Repetition(max_pattern_size=256, min_pattern_size=128, min_count=16)
"""The loops that end the transcript of a page. 2,048 tokens or more must repeat themselves, which
is more than the blank rows of a form or a column of zeros have. A line of 16 tokens that goes on
for ever ends after 2,048 tokens, and one of 100 tokens after 3,200."""
DEFAULTS = {
    "rolmocr": RequestDefaults(
        "Return the plain text representation of this document as if you were reading it "
        "naturally.\n",
        temperature=0.2,
        max_tokens=4096,
        repetition=PAGE_LOOPS,
    ),
    "olmocr": RequestDefaults(repetition=PAGE_LOOPS),
}
"""What fine-tunes do if a request leaves it open, by a part of their names in lower case. The
model card of RolmOCR has its instruction, temperature and length
(https://huggingface.co/reducto/RolmOCR)."""


class Qwen25VL(Family):
    """Qwen2.5-VL and its fine-tunes, in the published layout and in those of newer transformers."""

    model_type = "qwen2_5_vl"
    title = "Qwen2.5-VL, RolmOCR, olmOCR, Nanonets-OCR2"
    num_position_components = 3
    tower_prefixes = ("model.visual.",)
    embedding_name = "model.language_model.embed_tokens.weight"
    lora_modules = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    layers_name = "model.language_model.layers"

    def recognises(self, path: Path, config: dict[str, Any]) -> bool:
        """Some trainers save the model type of the language model alone."""
        return config.get("model_type") in (self.model_type, f"{self.model_type}_text")

    def uses(self, checkpoint: "Checkpoint", name: str) -> bool:
        return name != HEAD or not is_tied(checkpoint)

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
        return replace(sizes_of(checkpoint), pads_groups=True)

    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int | Fraction:
        if name.endswith("norm.weight"):
            return 1
        if ".q_proj." in name or ".o_proj." in name:
            return Fraction(sizes.num_heads, sizes.heads_per_rank(world_size))
        if ".k_proj." in name or ".v_proj." in name:
            return min(world_size, sizes.num_kv_heads)
        return world_size

    def patches_per_token(self, checkpoint: "Checkpoint") -> int:
        return merge_size(checkpoint.vision_config) ** 2

    def values_per_patch(self, checkpoint: "Checkpoint") -> int:
        return 3 * patch_size(checkpoint) ** 2

    def frames_per_patch(self, checkpoint: "Checkpoint", kind: ItemKind) -> int:
        return temporal_patch_size(checkpoint) if kind == "video" else 1

    def max_patches(
        self, checkpoint: "Checkpoint", min_pixels: int | None, max_pixels: int | None
    ) -> int:
        """Return the most patches of a resized image, or of a video.

        `smart_resize` keeps to `max_pixels`, except that it rounds the sides of very small and of
        very long images up.
        """
        low, high = pixel_limits(checkpoint.preprocessor_config, min_pixels, max_pixels)
        factor = patch_size(checkpoint) * merge_size(checkpoint.vision_config)
        side = math.sqrt(low * MAX_ASPECT_RATIO) / factor
        grown = low // factor**2 + 2 * math.ceil(side) + 1
        tokens = max(high // factor**2, grown, MAX_ASPECT_RATIO, MAX_VIDEO_TOKENS)
        return min(tokens, self.max_model_len(checkpoint)) * self.patches_per_token(checkpoint)

    def objection_to_shape(
        self,
        checkpoint: "Checkpoint",
        grid_thw: tuple[int, int, int],
        content_size: tuple[int, int],
    ) -> str:
        _, rows, columns = grid_thw
        merge = merge_size(checkpoint.vision_config)
        patch = patch_size(checkpoint)
        if rows % merge or columns % merge:
            return f"an item is made of whole {merge} x {merge} squares of patches"
        if content_size != (rows * patch, columns * patch):
            return "the content does not fill the grid"
        return ""

    def max_model_len(self, checkpoint: "Checkpoint") -> int:
        return checkpoint.text_config["max_position_embeddings"]

    def request_defaults(self, checkpoint: "Checkpoint", names: tuple[str, ...]) -> RequestDefaults:
        lower = [name.lower() for name in names]
        found = (d for part, d in DEFAULTS.items() if any(part in name for name in lower))
        return next(found, RequestDefaults())

    def placeholder_id(self, checkpoint: "Checkpoint") -> int | None:
        return checkpoint.text_config.get("image_token_id")

    def placeholder_ids(self, checkpoint: "Checkpoint") -> dict[ItemKind, int | None]:
        ids: dict[ItemKind, int | None] = {"image": self.placeholder_id(checkpoint)}
        if "video_token_id" in checkpoint.text_config:
            ids["video"] = checkpoint.text_config["video_token_id"]
        return ids


def is_tied(checkpoint: "Checkpoint") -> bool:
    """Whether the embedding is the head, too.

    Files say so for the whole model, for the language model, or for both. If they disagree, the
    weights decide.
    """
    said = {
        section.get("tie_word_embeddings", False)
        for section in (checkpoint.config, checkpoint.text_config)
    }
    return said == {True} or (True in said and HEAD not in checkpoint.shapes)


def patch_size(checkpoint: "Checkpoint") -> int:
    """Return the pixels on a side of a patch."""
    size: int = (
        checkpoint.preprocessor_config.get("patch_size")
        or checkpoint.vision_config.get("patch_size")
        or DEFAULT_PATCH_SIZE
    )
    return size


def pixel_limits(
    config: dict[str, Any], min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """Return the least and the most pixels of a resized image.

    A limit that the deployment does not set comes from preprocessor_config.json, which has it under
    one of two names.
    """
    size = config.get("size") or {}
    low = min_pixels or config.get("min_pixels") or size.get("shortest_edge")
    high = max_pixels or config.get("max_pixels") or size.get("longest_edge")
    return low or DEFAULT_MIN_PIXELS, high or DEFAULT_MAX_PIXELS


def temporal_patch_size(checkpoint: "Checkpoint") -> int:
    """Return the frames that a patch of a video covers."""
    size: int = checkpoint.vision_config.get("temporal_patch_size", DEFAULT_TEMPORAL_PATCH_SIZE)
    return size


def tokens_per_second(vision_config: dict[str, Any]) -> int:
    """Return by how much the position in time advances in a second of a video."""
    count: int = vision_config.get("tokens_per_second", DEFAULT_TOKENS_PER_SECOND)
    return count


def max_video_tokens(checkpoint: "Checkpoint") -> int:
    """Return the most tokens that a video becomes."""
    return min(MAX_VIDEO_TOKENS, int(MAX_CONTEXT_SHARE * checkpoint.max_model_len))


def merge_size(vision_config: dict[str, Any]) -> int:
    """Return the patches on a side of the square that becomes one embedding."""
    size: int = vision_config.get("spatial_merge_size", DEFAULT_MERGE_SIZE)
    return size
