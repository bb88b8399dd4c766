"""WeMM-Chat-2k-CN, described without torch."""

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from common.families.family import BadCheckpoint, Family, ModelSizes, sizes_of
from common.model_files import read_optional_json, shown

if TYPE_CHECKING:
    import numpy as np

    from common.checkpoint import Checkpoint

INFIX = "original_linear."
"""What the published files have in the name of each weight that a low-rank pair extends."""
LAYERS = "language_model.model.layers"
ADAPTER_CONFIG = "adapter_config.json"
LORA_ADAPTER = "lora_adapter.json"
MAX_ALPHA = 10**6
SCALINGS = (None, "default", "dynamic")
"""What `rope_scaling` may say: dynamic scaling begins beyond the context."""
MAX_IMAGES = 1
DEFAULT_SHORTEST_EDGE = 756
DEFAULT_LONGEST_EDGE = 1960
DEFAULT_PATCH_SIZE = 14
DEFAULT_STRIDE = 4
NUM_SPLITTERS = 2
"""An image's embeddings stand between two rows that say where it begins and ends."""
START, END = "<|im_start|>", "<|im_end|>"
PUBLISHED_IDS = {START: 92543, END: 92542}


@dataclass(frozen=True, slots=True)
class LowRankFacts:
    """What the low-rank pairs have in common."""

    rank: int
    scale: float
    """The factor of what a pair adds."""


class Wemm(Family):
    """WeMM with the published names of tensors, or with those of `twinlens convert wemm`."""

    model_type = "wemm"
    title = "WeMM-Chat-2k-CN"
    vocabulary_file = "tokenizer.model"
    required_files = ()
    optional_files = (ADAPTER_CONFIG, LORA_ADAPTER)
    converts_names = True
    resampling = "bilinear"
    config_sections = ("image_processor", "downsampler_config", "spliter_emb_config")
    tower_prefixes = ("vision_tower.", "downsampler.", "visual_source_spliter_emb.")
    embedding_name = "language_model.model.tok_embeddings.weight"

    def check(self, checkpoint: "Checkpoint") -> None:
        check_supported(checkpoint)
        low_rank_facts(checkpoint)

    def canonical_name(self, name: str) -> str:
        """Return the name without the infix of weights that a low-rank pair extends."""
        return name.replace(INFIX, "")

    def sizes(self, checkpoint: "Checkpoint") -> ModelSizes:
        return sizes_of(checkpoint)

    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int | Fraction:
        """Ranks split the rows of wqkv, w1 and w3 with their B, and the columns of wo and w2 with
        their A."""
        is_by_columns = ".wo." in name or ".w2." in name
        if name.endswith("norm.weight"):
            return 1
        if ".Plora_A." in name:
            return world_size if is_by_columns else 1
        if ".Plora_B." in name and is_by_columns:
            return 1
        if ".wqkv." in name:
            num_local_kv = max(sizes.num_kv_heads // world_size, 1)
            num_local = sizes.num_heads // world_size + 2 * num_local_kv
            return Fraction(sizes.num_heads + 2 * sizes.num_kv_heads, num_local)
        return world_size

    def patches_per_token(self, checkpoint: "Checkpoint") -> int:
        """Any number of patches is possible: incomplete squares become a token, too."""
        return 1

    def num_item_tokens(self, checkpoint: "Checkpoint", grid_thw: tuple[int, int, int]) -> int:
        _, rows, columns = grid_thw
        return num_tokens(rows, columns, downsampler_stride(checkpoint))

    def values_per_patch(self, checkpoint: "Checkpoint") -> int:
        return 3 * patch_size(checkpoint) ** 2

    def max_patches(
        self, checkpoint: "Checkpoint", min_pixels: int | None, max_pixels: int | None
    ) -> int:
        """Return the patches of the largest square, or those that `max_pixels` leaves."""
        limits = [
            max_side(checkpoint) ** 2,
            self.max_model_len(checkpoint) * downsampler_stride(checkpoint) ** 2,
        ]
        if max_pixels is not None:
            limits.append(max_pixels // patch_size(checkpoint) ** 2)
        return min(limits)

    def objection_to_shape(
        self,
        checkpoint: "Checkpoint",
        grid_thw: tuple[int, int, int],
        content_size: tuple[int, int],
    ) -> str:
        steps, rows, columns = grid_thw
        if steps != 1 or (rows, columns) != grid_of(*content_size, patch_size(checkpoint)):
            return "a still image has one step of as many patches as its content needs"
        if max(rows, columns) > max_side(checkpoint):
            return f"a side has more than {max_side(checkpoint)} patches"
        if max(rows, columns) > max_aspect(checkpoint) * min(rows, columns):
            return f"a side has more than {max_aspect(checkpoint)} times the other's patches"
        return ""

    def objection_to_prompt(self, checkpoint: "Checkpoint", token_ids: "np.ndarray") -> str:
        num_images = int((token_ids == self.placeholder_id(checkpoint)).sum())
        return objection_to_images(num_images)

    def max_model_len(self, checkpoint: "Checkpoint") -> int:
        """Return the length up to which the dynamic scaling of positions changes nothing."""
        return checkpoint.text_config["max_position_embeddings"]

    def placeholder_id(self, checkpoint: "Checkpoint") -> int | None:
        """Return the first id beyond the vocabulary, because no token stands for an image."""
        return checkpoint.sizes.vocab_size

    def end_token_ids(self, checkpoint: "Checkpoint") -> tuple[int, ...]:
        return (special_id(checkpoint, END),)


def objection_to_images(num_images: int) -> str:
    """Return why a request cannot have this number of images; empty if it can."""
    if num_images <= MAX_IMAGES:
        return ""
    return f"this model takes one image, not {num_images}: send one request for each image"


def check_supported(checkpoint: "Checkpoint") -> None:
    """Raise BadCheckpoint if config.json asks for something that is not supported."""
    given = checkpoint.text_config
    scaling = given.get("rope_scaling") or {}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind not in SCALINGS:
        raise BadCheckpoint(
            f"{checkpoint.path}: rope_scaling in config.json is of type {kind!r}, supported is "
            "'dynamic', which begins beyond the context"
        )
    wanted = {
        "bias": False,
        "do_image_splitting": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    for name, supported in wanted.items():
        if given.get(name) not in (None, supported):
            raise BadCheckpoint(
                f"{checkpoint.path}: {name} in config.json is {given[name]!r}, supported is "
                f"{supported!r}"
            )


def low_rank_facts(checkpoint: "Checkpoint") -> LowRankFacts:
    """Return the rank and the scale of the low-rank pairs.

    The rank is that of the tensors. adapter_config.json may name it, and the scale as `lora_alpha`
    over the rank. Raises BadCheckpoint if they contradict each other.
    """
    path = checkpoint.path
    shapes = {
        info.shape for name, info in checkpoint.tensors.items() if name.endswith(".Plora_A.weight")
    }
    ranks = {shape[0] for shape in shapes if shape}
    if len(ranks) != 1:
        found = " and ".join(map(str, sorted(ranks))) or "none"
        raise BadCheckpoint(
            f"{path}: the tensors Plora_A must have one rank, they have {found}: download the "
            "whole repository"
        )
    rank = ranks.pop()
    named = read_optional_json(path / LORA_ADAPTER)
    if not all(isinstance(file, str) for file in named.values()):
        raise BadCheckpoint(f"{path}: {LORA_ADAPTER} must name a directory for each adapter")
    adapter = read_optional_json(path / ADAPTER_CONFIG)
    if adapter.get("r", rank) != rank:
        raise BadCheckpoint(
            f"{path}: r in {ADAPTER_CONFIG} is {shown(adapter['r'])}, the low-rank pairs have the "
            f"rank {rank}: correct the file, or remove it"
        )
    alpha = adapter.get("lora_alpha", rank)
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise BadCheckpoint(
            f"{path}: lora_alpha in {ADAPTER_CONFIG} is {shown(alpha)}, which is not a number from "
            f"0 to {MAX_ALPHA}"
        )
    return LowRankFacts(rank, alpha / rank)


def special_id(checkpoint: "Checkpoint", name: str) -> int:
    """Return the id of a special token: that of the vocabulary, else the published one.

    Raises BadCheckpoint if it lies outside the model's vocabulary.
    """
    # Readers of vocabularies import checkpoints, and these import families.
    from common.vocabulary.sentencepiece import special_tokens
    from common.vocabulary.sentencepiece_model import read_model

    file = checkpoint.path / checkpoint.family.vocabulary_file
    named = {content: id for id, content in special_tokens(file, read_model(file)).items()}
    token_id = named.get(name, PUBLISHED_IDS[name])
    if token_id >= checkpoint.sizes.vocab_size:
        raise BadCheckpoint(
            f"{checkpoint.path}: the token {name} has the id {token_id}, which is outside the "
            f"vocabulary of {checkpoint.sizes.vocab_size}: name it in tokenizer_config.json"
        )
    return token_id


def patch_size(checkpoint: "Checkpoint") -> int:
    """Return the pixels on a side of a patch."""
    size: int = checkpoint.vision_config.get("patch_size", DEFAULT_PATCH_SIZE)
    return size


def downsampler_stride(checkpoint: "Checkpoint") -> int:
    """Return the patches on a side of the square that becomes one embedding."""
    stride: int = checkpoint.section("downsampler_config").get("stride", DEFAULT_STRIDE)
    return stride


def edges(checkpoint: "Checkpoint") -> tuple[int, int]:
    """Return the least length of a resized image's sides, and that of its longer side."""
    size: dict[str, Any] = checkpoint.section("image_processor").get("size") or {}
    shortest: int = size.get("shortest_edge") or DEFAULT_SHORTEST_EDGE
    longest: int = size.get("longest_edge") or DEFAULT_LONGEST_EDGE
    return shortest, longest


def max_side(checkpoint: "Checkpoint") -> int:
    """Return the most patches on a side of an image."""
    return -(-max(edges(checkpoint)) // patch_size(checkpoint))


def max_aspect(checkpoint: "Checkpoint") -> int:
    """Return how many times the patches of one side the other may have.

    The sides in pixels have at most the ratio of the two edges. The shorter one loses up to a pixel
    when an image is made smaller, and a patch that is not full counts, too.
    """
    shortest, longest = edges(checkpoint)
    patch = patch_size(checkpoint)
    return -(-max(longest, shortest) * (patch + 1) // (shortest * patch))


def grid_of(height: int, width: int, patch: int) -> tuple[int, int]:
    """Return the rows and columns of patches that content of this size in pixels needs."""
    return -(-height // patch), -(-width // patch)


def num_tokens(rows: int, columns: int, stride: int) -> int:
    """Return the embeddings of a grid of patches: one for each square, and the two around them."""
    return -(-rows // stride) * -(-columns // stride) + NUM_SPLITTERS
