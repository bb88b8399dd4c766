"""Qwen-VL and Qwen-VL-Chat, the first generation, described without torch."""

from typing import TYPE_CHECKING, Literal

from common.families.family import BadCheckpoint, Family, ModelSizes, RequestDefaults, TiktokenRules

if TYPE_CHECKING:
    import numpy as np

    from common.checkpoint import Checkpoint

NUM_IMAGE_TOKENS = 256
"""The embeddings of an image. No configuration changes their number."""
NUM_BYTES = 256
END_OF_TEXT = "<|endoftext|>"
TURN_MARKERS = ("<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_MARKERS = ("<img>", "</img>")
IMAGE_PLACEHOLDER = "<imgpad>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    *TURN_MARKERS,
    *(f"<|extra_{i}|>" for i in range(205)),
    *MARKUP_TOKENS,
    *IMAGE_MARKERS,
    IMAGE_PLACEHOLDER,
)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ChatFormat = Literal["chatml", "raw"]


class QwenVL(Family):
    """Qwen-VL, which continues raw text, and Qwen-VL-Chat."""

    model_type = "qwen"
    title = "Qwen-VL, Qwen-VL-Chat"
    vocabulary_file = "qwen.tiktoken"
    tiktoken = TiktokenRules(SPLIT_PATTERN, SPECIAL_TOKENS)
    required_files = ()
    markup_tokens = MARKUP_TOKENS
    answers_hold_boxes = True
    tower_prefixes = ("transformer.visual.",)
    embedding_name = "transformer.wte.weight"
    lora_modules = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    layers_name = "transformer.h"

    def canonical_name(self, name: str) -> str:
        return name

    def sizes(self, checkpoint: "Checkpoint") -> ModelSizes:
        """Return the sizes. `intermediate_size` counts the rows of two matrices together."""
        given = checkpoint.config
        try:
            sizes = ModelSizes(
                vocab_size=given["vocab_size"],
                hidden_size=given["hidden_size"],
                intermediate_size=given["intermediate_size"] // 2,
                num_layers=given["num_hidden_layers"],
                num_heads=given["num_attention_heads"],
                num_kv_heads=given["num_attention_heads"],
                head_dim=given["kv_channels"],
            )
        except KeyError as e:
            raise BadCheckpoint(f"{checkpoint.path}: config.json lacks {e}") from e
        if self.num_ranks(checkpoint) + len(SPECIAL_TOKENS) > sizes.vocab_size:
            raise BadCheckpoint(
                f"{checkpoint.path}: image_start_id in config.json puts special tokens outside the "
                f"vocabulary of {sizes.vocab_size}"
            )
        return sizes

    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int:
        return 1 if name.endswith((".ln_1.weight", ".ln_2.weight", ".ln_f.weight")) else world_size

    def patches_per_token(self, checkpoint: "Checkpoint") -> int:
        return self.max_patches(checkpoint, None, None) // NUM_IMAGE_TOKENS

    def values_per_patch(self, checkpoint: "Checkpoint") -> int:
        return 3 * patch_size(checkpoint) ** 2

    def max_patches(
        self, checkpoint: "Checkpoint", min_pixels: int | None, max_pixels: int | None
    ) -> int:
        """Return the patches of any image: all are resized to one square."""
        return grid_side(checkpoint) ** 2

    def objection_to_shape(
        self,
        checkpoint: "Checkpoint",
        grid_thw: tuple[int, int, int],
        content_size: tuple[int, int],
    ) -> str:
        side = grid_side(checkpoint)
        pixels = image_size(checkpoint)
        if grid_thw != (1, side, side) or content_size != (pixels, pixels):
            return f"an image has {pixels} x {pixels} pixels and {side} x {side} patches"
        return ""

    def max_model_len(self, checkpoint: "Checkpoint") -> int:
        return checkpoint.config["max_position_embeddings"]

    def request_defaults(self, checkpoint: "Checkpoint", names: tuple[str, ...]) -> RequestDefaults:
        """Return the length that generation_config.json names."""
        return RequestDefaults(max_tokens=checkpoint.generation_config.get("max_new_tokens"))

    def placeholder_id(self, checkpoint: "Checkpoint") -> int | None:
        return token_id(checkpoint, IMAGE_PLACEHOLDER)

    def num_ranks(self, checkpoint: "Checkpoint") -> int:
        image_start_id = visual_size(checkpoint, "image_start_id")
        num_ranks = image_start_id - SPECIAL_TOKENS.index(IMAGE_MARKERS[0])
        if num_ranks < NUM_BYTES:
            raise BadCheckpoint(
                f"{checkpoint.path}: image_start_id {image_start_id} in config.json leaves no "
                "room for the tokens of all bytes"
            )
        return num_ranks

    def end_token_ids(self, checkpoint: "Checkpoint") -> tuple[int, ...]:
        """Return the end of a text, and the markers of turns if the model has turns."""
        has_turns = chat_format(checkpoint) == "chatml"
        names = (END_OF_TEXT, *TURN_MARKERS) if has_turns else (END_OF_TEXT,)
        return tuple(token_id(checkpoint, name) for name in names)

    def objection_to_prompt(self, checkpoint: "Checkpoint", token_ids: "np.ndarray") -> str:
        """Return what is wrong with the markers of images; empty if each image has its own."""
        begin, end = (token_id(checkpoint, name) for name in IMAGE_MARKERS)
        begins, pads, ends = (
            (token_ids == id).nonzero()[0] for id in (begin, self.placeholder_id(checkpoint), end)
        )
        if (begins + 1).tolist() == pads.tolist() == (ends - 1).tolist():
            return ""
        return f"each image is <img>, one <imgpad> and </img>: {begin}, {end + 1}, {end}"


def token_id(checkpoint: "Checkpoint", special_token: str) -> int:
    """Return the id of a special token. They follow the ranks in their order."""
    return QwenVL().num_ranks(checkpoint) + SPECIAL_TOKENS.index(special_token)


def chat_format(checkpoint: "Checkpoint") -> ChatFormat:
    """Return how the model is asked. Raises BadCheckpoint if the format is not supported."""
    match checkpoint.generation_config.get("chat_format", "raw"):
        case "chatml":
            return "chatml"
        case "raw":
            return "raw"
        case other:
            raise BadCheckpoint(
                f"{checkpoint.path}: chat_format {other!r} in generation_config.json is not "
                "supported; supported: chatml, raw"
            )


def seq_length(checkpoint: "Checkpoint") -> int:
    """Return the context of the training. Raises BadCheckpoint if it is missing, or too short."""
    length: int = checkpoint.config.get("seq_length", 0)
    if length < 2:
        raise BadCheckpoint(f"{checkpoint.path}: seq_length in config.json is missing, or below 2")
    return length


def visual_size(checkpoint: "Checkpoint", name: str) -> int:
    """Return a count from `visual` in config.json. Raises BadCheckpoint if it is missing."""
    if name not in checkpoint.vision_config:
        raise BadCheckpoint(
            f"{checkpoint.path}: config.json has no {name} in visual: it is not a Qwen-VL model"
        )
    size: int = checkpoint.vision_config[name]
    return size


def patch_size(checkpoint: "Checkpoint") -> int:
    """Return the pixels on a side of a patch."""
    return visual_size(checkpoint, "patch_size")


def image_size(checkpoint: "Checkpoint") -> int:
    """Return the pixels on a side of the square to which every image is resized.

    Raises BadCheckpoint if its patches cannot be divided among the embeddings.
    """
    size = visual_size(checkpoint, "image_size")
    patch = patch_size(checkpoint)
    if size % patch or (size // patch) ** 2 % NUM_IMAGE_TOKENS:
        raise BadCheckpoint(
            f"{checkpoint.path}: an image of {size} x {size} pixels has no multiple of "
            f"{NUM_IMAGE_TOKENS} patches of {patch} x {patch}"
        )
    return size


def grid_side(checkpoint: "Checkpoint") -> int:
    """Return the patches on a side of an image."""
    return image_size(checkpoint) // patch_size(checkpoint)
