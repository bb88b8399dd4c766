"""The description of a model family: what launching, sizing and routing need to know."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.messages import ItemKind, Repetition, Task

if TYPE_CHECKING:
    import numpy as np

    from common.checkpoint import Checkpoint

TP_SIZES = (1, 2, 4, 8)
PromptForm = tuple[int, tuple[tuple[int, int], ...]]
"""The tokens of an expanded prompt, and the offset and the length of each item in it."""


class BadCheckpoint(ValueError):
    """The model directory cannot be served; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class TiktokenRules:
    """What a tokenizer needs besides its tiktoken file, which holds only bytes and ranks."""

    split_pattern: str
    """The regular expression that cuts a text into pieces. No token crosses their borders."""
    special_tokens: tuple[str, ...]
    """The tokens whose ids follow the ranks, in their order."""


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """What a model does if a request leaves it open. What a client sends always wins."""

    instruction: str = ""
    """What the user says if a conversation has items and no text of the user."""
    temperature: float | None = None
    """It replaces the value of generation_config.json."""
    max_tokens: int | None = None
    """The length of an answer; None for what the prompt leaves of the context."""
    repetition: Repetition | None = None
    """The loops that end an answer; None if none do."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a language model, read from its configuration."""

    vocab_size: int
    hidden_size: int
    """The width of the inputs: token embeddings, and the embeddings of items."""
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """0 if the model keeps no keys and values."""
    head_dim: int
    pads_groups: bool = False
    """Whether the family's loader adds query heads of zeros, so that ranks share a key head evenly.
    They change nothing: such heads have no weight in the output."""
    shares_vocabulary: bool = True
    """Whether each rank holds a part of the vocabulary's rows."""
    only_world_size: int = 0
    """The number of ranks for which the weights were cut into files; 0 if they are whole."""

    def heads_per_rank(self, world_size: int) -> int:
        """Return the query heads of each of `world_size` ranks, those of zeros included.

        Return 0 if the ranks cannot share the heads.
        """
        if self.num_heads % world_size == 0:
            return self.num_heads // world_size
        kv = self.num_kv_heads
        if not self.pads_groups or kv == 0 or world_size % kv or self.num_heads % kv:
            return 0
        group = self.num_heads // kv
        ranks = world_size // kv
        share = -(-group // ranks)
        # A rank with nothing but zeros would be of no use.
        return share if (ranks - 1) * share < group else 0

    def query_heads(self, rank: int, world_size: int) -> tuple[int, int]:
        """Return the bounds of a rank's query heads in the file; heads of zeros follow them."""
        share = self.heads_per_rank(world_size)
        if self.num_heads % world_size == 0:
            return rank * share, (rank + 1) * share
        group = self.num_heads // self.num_kv_heads
        index, part = divmod(rank, world_size // self.num_kv_heads)
        first = index * group + part * share
        return first, min(first + share, (index + 1) * group)

    def kv_bytes_per_token(self, world_size: int, item_bytes: int) -> int:
        """Return the bytes that a token takes in the KV cache of one of `world_size` ranks."""
        if self.num_kv_heads == 0:
            return 0
        num_local_kv_heads = max(self.num_kv_heads // world_size, 1)
        return 2 * self.num_layers * num_local_kv_heads * self.head_dim * item_bytes

    def fits(self, world_size: int) -> bool:
        """Whether `world_size` ranks can share the model.

        Ranks share a key head if there are fewer key heads than ranks.
        """
        if self.only_world_size and world_size != self.only_world_size:
            return False
        if self.intermediate_size % world_size:
            return False
        if self.shares_vocabulary and self.vocab_size % world_size:
            return False
        kv = self.num_kv_heads
        shares_keys = kv == 0 or kv % world_size == 0 or world_size % kv == 0
        return shares_keys and self.heads_per_rank(world_size) > 0

    def check_fits(self, world_size: int) -> None:
        """Raise BadCheckpoint if `world_size` ranks cannot share the model."""
        if self.fits(world_size):
            return
        if self.only_world_size:
            raise BadCheckpoint(
                f"the weights were cut for {self.only_world_size} ranks: use --tp "
                f"{self.only_world_size}, or the file that they were cut from"
            )
        fitting = ", ".join(str(size) for size in TP_SIZES if self.fits(size))
        parts = [f"{self.num_heads} heads"]
        if self.num_kv_heads:
            parts.append(f"{self.num_kv_heads} key heads")
        parts.append(f"an MLP of {self.intermediate_size}")
        if self.shares_vocabulary:
            parts.append(f"a vocabulary of {self.vocab_size}")
        raise BadCheckpoint(
            f"{', '.join(parts[:-1])} and {parts[-1]} cannot be shared by {world_size} ranks: use "
            f"--tp {fitting}"
        )


class Family(ABC):
    """One model family. It is the same for all its checkpoints, which methods get as arguments."""

    model_type: str
    """The `model_type` in config.json, and the family's name in all tables."""
    title: str
    """The common names of the family's models."""
    vocabulary_file: str = "tokenizer.json"
    """The file with the tokens: a tokenizer.json, a tiktoken file (`*.tiktoken`), or a
    SentencePiece model (`*.model`)."""
    tiktoken: TiktokenRules | None = None
    """What completes a tiktoken file; None for other kinds of vocabulary file."""
    required_files: tuple[str, ...] = ("preprocessor_config.json",)
    """What a model directory must hold besides config.json, the vocabulary and the weights."""
    optional_files: tuple[str, ...] = ()
    """Further files that the family reads if they exist."""
    resampling: Literal["bicubic", "bilinear"] = "bicubic"
    """How pixels are interpolated when an image is resized."""
    config_sections: tuple[str, ...] = ()
    """The objects in config.json that the family reads besides `text_config` and
    `vision_config`."""
    converts_names: bool = False
    """Whether `twinlens convert` writes the family's checkpoints with their canonical names."""
    needed_roles: tuple[str, ...] = ("vision", "llm")
    """The stages after preprocess that a request with items passes through."""
    tasks: tuple[Task, ...] = ("generate",)
    """What the family's models can do. A checkpoint may do less: see `tasks_of`."""
    markup_tokens: tuple[str, ...] = ()
    """The special tokens that stay in an answer's text, because a client reads them."""
    answers_hold_boxes: bool = False
    """Whether answers may mark parts of the latest image, as `common/boxes.py` reads them."""
    num_position_components: int = 1
    """The number of rows of `Prompt.positions`."""
    tower_prefixes: tuple[str, ...] = ()
    """The prefixes of the canonical names of the vision tower's tensors."""
    embedding_name: str
    """The canonical name of the token embedding."""
    lora_modules: tuple[str, ...] = ()
    """The modules of a layer that a LoRA adapter may change; empty if there are no adapters for the
    family."""
    layers_name: str = ""
    """The canonical name of the list of layers, for LoRA adapters."""

    def recognises(self, path: Path, config: dict[str, Any]) -> bool:
        """Whether a model directory is of this family.

        `config` is what config.json holds; it is empty if there is no such file.
        """
        return config.get("model_type") == self.model_type

    def weight_files(self, path: Path, rank: int = 0) -> list[Path]:
        """Return the files with the weights of a directory that has them in no usual place.

        The usual places are those of Hugging Face: `model.safetensors` and `pytorch_model.bin`, and
        their shards. `rank` chooses among the files of weights that were cut for each rank.
        """
        return []

    def part_files(self, path: Path, world_size: int) -> list[Path]:
        """Return the files into which `twinlens shard` cuts weights, one for each rank."""
        return []

    def tasks_of(self, checkpoint: "Checkpoint") -> tuple[Task, ...]:
        """Return what this checkpoint can do; the first task is what it is mainly for."""
        return self.tasks

    def stages_of(self, checkpoint: "Checkpoint") -> tuple[str, ...]:
        """Return the roles that requests to this checkpoint pass through."""
        writes = "generate" in self.tasks_of(checkpoint)
        return ("preprocess", *self.needed_roles, *(("detokenizer",) if writes else ()))

    def check(self, checkpoint: "Checkpoint") -> None:  # noqa: B027 - most have nothing to check
        """Check what the family alone reads of a model directory.

        Raises BadCheckpoint if something is wrong.
        """

    @abstractmethod
    def canonical_name(self, name: str) -> str:
        """Return the one name of a tensor in our code, whichever layout its file follows."""

    def uses(self, checkpoint: "Checkpoint", name: str) -> bool:
        """Whether the model needs a tensor, by its canonical name. Others are not loaded."""
        return True

    @abstractmethod
    def sizes(self, checkpoint: "Checkpoint") -> ModelSizes:
        """Return the sizes of the language model. Raises BadCheckpoint if one is missing."""

    @abstractmethod
    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int | Fraction:
        """Return how many times the part of one of `world_size` ranks makes up a tensor.

        It is less than the number of ranks if they hold parts in common, or pad theirs. `name` is
        its canonical name.
        """

    @abstractmethod
    def patches_per_token(self, checkpoint: "Checkpoint") -> int:
        """Return a number of which the patch counts of items and buckets are multiples.

        It is the patches that become one embedding, unless the family overrides `num_item_tokens`.
        """

    def num_item_tokens(self, checkpoint: "Checkpoint", grid_thw: tuple[int, int, int]) -> int:
        """Return the number of embeddings that an item with this grid of patches becomes."""
        return prod(grid_thw) // self.patches_per_token(checkpoint)

    @abstractmethod
    def values_per_patch(self, checkpoint: "Checkpoint") -> int:
        """Return the bytes of a patch of an image, as preprocess sends it."""

    def frames_per_patch(self, checkpoint: "Checkpoint", kind: ItemKind) -> int:
        """Return how many frames a patch covers. Its bytes are as many times those of one frame."""
        return 1

    def max_patches(
        self, checkpoint: "Checkpoint", min_pixels: int | None, max_pixels: int | None
    ) -> int:
        """Return the most patches that preprocess makes of an item.

        A limit that is None is the checkpoint's. No item is larger than the context.
        """
        return self.max_model_len(checkpoint) * self.patches_per_token(checkpoint)

    def objection_to_shape(
        self,
        checkpoint: "Checkpoint",
        grid_thw: tuple[int, int, int],
        content_size: tuple[int, int],
    ) -> str:
        """Return why no item has this grid of patches and this content; empty if one may."""
        return ""

    @abstractmethod
    def max_model_len(self, checkpoint: "Checkpoint") -> int:
        """Return the model's context in tokens, prompt and answer together."""

    def request_defaults(self, checkpoint: "Checkpoint", names: tuple[str, ...]) -> RequestDefaults:
        """Return what the model, which is served under these names, does if a request is silent."""
        return RequestDefaults()

    @abstractmethod
    def placeholder_id(self, checkpoint: "Checkpoint") -> int | None:
        """Return the token that stands for an image in a prompt; None if there is no such token."""

    def placeholder_ids(self, checkpoint: "Checkpoint") -> dict[ItemKind, int | None]:
        """Return the tokens that stand for items, by the kinds that the checkpoint takes."""
        return {"image": self.placeholder_id(checkpoint)}

    def prompt_forms(self, checkpoint: "Checkpoint") -> frozenset[PromptForm] | None:
        """Return the only forms that prompts have; None if they may have any."""
        return None

    def labels(self, checkpoint: "Checkpoint") -> tuple[str, ...]:
        """Return the labels of a model that classifies, in the order of its probabilities."""
        return ()

    def num_ranks(self, checkpoint: "Checkpoint") -> int | None:
        """Return how many tokens its tiktoken file has; None if config.json does not say."""
        return None

    def end_token_ids(self, checkpoint: "Checkpoint") -> tuple[int, ...]:
        """Return the tokens that end an answer besides the checkpoint's `eos_token_id`."""
        return ()

    def objection_to_prompt(self, checkpoint: "Checkpoint", token_ids: "np.ndarray") -> str:
        """Return why no unexpanded prompt has these tokens; empty if one may.

        Their number of placeholders is right.
        """
        return ""


def sizes_of(checkpoint: "Checkpoint") -> ModelSizes:
    """Return the sizes of a language model that config.json describes as Hugging Face does.

    Raises BadCheckpoint if one is missing.
    """
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
