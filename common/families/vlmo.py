"""VLMo (base, base_plus, large), described without torch.

A published file holds tensors alone, so the sizes are read from their shapes. `vlmo_config.json`
may say how many heads there are.
"""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.families.family import BadCheckpoint, Family, ModelSizes, PromptForm
from common.messages import Task
from common.model_files import read_file, read_optional_json

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

CONFIG = "vlmo_config.json"
LABELS = "answer2label.txt"
PARTS = "part_model"
"""The folder with a folder for each rank, if the weights were cut."""
PART_FILE = "cut_VQA_weights.pt"
BIAS_TABLE = "relative_position_bias_table"
IMAGE_POSITIONS = "transformer.pos_embed"
CLASSIFIER = "vqa_classifier."
RETRIEVAL = ("itc_text_proj.", "itc_image_proj.")
KNOWN_HEADS = {544: 16, 768: 12, 1024: 16}
"""The heads of the published models by their widths."""
IMAGE_ROLES = 3
"""The entries of the bias table that stand for the image's class token: row, column, corner."""
TEXT_REACH = 196
"""The bias table has entries for texts of this length: the longest of the pre-training."""
IGNORED = re.compile(
    r"(.*_)?relative_position_index|text_embeddings\.position_ids|logit_scale|logit_vl_scale"
    r"|(mlm_score|itm_score|itc_vl_text_proj|itc_vl_image_proj|nlvr2_classifier)\..*"
    r"|itc_(text|image)_proj\..*|pooler\..*|vqa_classifier\..*"
    r"|text_embeddings\.position_embeddings\.weight"
)
"""What published files hold besides what a task needs."""


class Vlmo(Family):
    """VLMo, fine-tuned to answer questions about images, or to retrieve."""

    model_type = "vlmo"
    title = "VLMo"
    vocabulary_file = "vocab.txt"
    required_files = ()
    optional_files = (CONFIG, LABELS)
    needed_roles = ("llm",)
    tasks = ("classify", "embed")
    embedding_name = "text_embeddings.word_embeddings.weight"

    def recognises(self, path: Path, config: dict[str, Any]) -> bool:
        if config:
            return config.get("model_type") == self.model_type
        return (path / self.vocabulary_file).exists() and bool(self.weight_files(path))

    def weight_files(self, path: Path, rank: int = 0) -> list[Path]:
        if (path / PARTS).is_dir():
            return [path / PARTS / str(rank) / PART_FILE]
        return sorted(path.glob("*.pt"))

    def part_files(self, path: Path, world_size: int) -> list[Path]:
        return [path / PARTS / str(rank) / PART_FILE for rank in range(world_size)]

    def tasks_of(self, checkpoint: "Checkpoint") -> tuple[Task, ...]:
        """Return the task that the file's head is for. Raises BadCheckpoint if it has no head."""
        names = checkpoint.tensors
        if any(name.startswith(CLASSIFIER) for name in names):
            return ("classify",)
        if all(any(name.startswith(head) for name in names) for head in RETRIEVAL):
            return ("embed",)
        raise BadCheckpoint(
            f"{checkpoint.path} holds neither a classifier ({CLASSIFIER}*) nor projections for "
            f"retrieval ({', '.join(head + '*' for head in RETRIEVAL)}): give a fine-tuned model"
        )

    def check(self, checkpoint: "Checkpoint") -> None:
        """Raises BadCheckpoint if a tensor is not known, a label is missing, or vlmo_config.json
        contradicts the tensors."""
        if len(files := self.weight_files(checkpoint.path)) > 1:
            names = ", ".join(file.name for file in files)
            raise BadCheckpoint(f"{checkpoint.path} holds {names}: leave one model there")
        known = ("transformer.", "text_embeddings.", "token_type_embeddings.")
        for name in checkpoint.tensors:
            if not name.startswith((*known, BIAS_TABLE)) and not IGNORED.fullmatch(name):
                raise BadCheckpoint(f"{checkpoint.path}: {name} is no tensor of VLMo")
        check_config(checkpoint)
        if "classify" in self.tasks_of(checkpoint):
            labels(checkpoint)

    def canonical_name(self, name: str) -> str:
        return name

    def uses(self, checkpoint: "Checkpoint", name: str) -> bool:
        if name == "text_embeddings.position_embeddings.weight":
            return has_absolute_positions(checkpoint)
        if name.startswith(("pooler.", CLASSIFIER)):
            return "classify" in self.tasks_of(checkpoint)
        if name.startswith(RETRIEVAL):
            return "embed" in self.tasks_of(checkpoint)
        return not IGNORED.fullmatch(name)

    def sizes(self, checkpoint: "Checkpoint") -> ModelSizes:
        vocab_size, width = shape_of(checkpoint, self.embedding_name)
        blocks = [name for name in checkpoint.tensors if name.endswith(".norm1.weight")]
        num_heads = heads_of(checkpoint, width, len(blocks))
        inner, _ = shape_of(checkpoint, "transformer.blocks.0.mlp_text.fc1.weight")
        num_parts = num_parts_of(checkpoint.path)
        return ModelSizes(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=inner * max(num_parts, 1),
            num_layers=len(blocks),
            num_heads=num_heads,
            num_kv_heads=0,
            head_dim=width // num_heads,
            shares_vocabulary=False,
            only_world_size=num_parts,
        )

    def num_shares(self, name: str, sizes: ModelSizes, world_size: int) -> int:
        is_whole = cut_dim(name) is None or sizes.only_world_size
        return 1 if is_whole else world_size

    def patches_per_token(self, checkpoint: "Checkpoint") -> int:
        return 1

    def values_per_patch(self, checkpoint: "Checkpoint") -> int:
        return 3 * patch_size(checkpoint) ** 2

    def max_patches(
        self, checkpoint: "Checkpoint", min_pixels: int | None, max_pixels: int | None
    ) -> int:
        """Return the patches of any image: all are resized to one square."""
        return grid_side(checkpoint) ** 2

    def max_model_len(self, checkpoint: "Checkpoint") -> int:
        return max(num_tokens for num_tokens, _ in self.prompt_forms(checkpoint))

    def prompt_forms(self, checkpoint: "Checkpoint") -> frozenset[PromptForm]:
        """Return the forms of a text, of an image after its class token, and of both."""
        text = max_text_len(checkpoint)
        num_patches = grid_side(checkpoint) ** 2
        image = (1 + num_patches, ((1, num_patches),))
        both = (text + 1 + num_patches, ((text + 1, num_patches),))
        return frozenset({both} if "classify" in self.tasks_of(checkpoint) else {(text, ()), image})

    def placeholder_id(self, checkpoint: "Checkpoint") -> int | None:
        """Return the mask token, which no text becomes."""
        return special_id(checkpoint, "[MASK]")

    def labels(self, checkpoint: "Checkpoint") -> tuple[str, ...]:
        return labels(checkpoint) if "classify" in self.tasks_of(checkpoint) else ()


def cut_dim(name: str) -> int | None:
    """Return the dimension along which ranks share a tensor; None if each holds it whole."""
    if not name.startswith("transformer.blocks."):
        return None
    if name.endswith(("qkv.weight", "q_bias", "v_bias", "fc1.weight", "fc1.bias")):
        return 0
    return 1 if name.endswith(("attn.proj.weight", "fc2.weight")) else None


def num_parts_of(path: Path) -> int:
    """Return for how many ranks the weights of a directory were cut; 0 if they are whole.

    Raises BadCheckpoint if a part is missing.
    """
    if not (path / PARTS).is_dir():
        return 0
    names = {entry.name for entry in (path / PARTS).iterdir() if (entry / PART_FILE).is_file()}
    if names != {str(rank) for rank in range(len(names))}:
        raise BadCheckpoint(
            f"{path / PARTS} has no folder for each rank, named 0, 1, ...: cut the weights again"
        )
    return len(names)


def check_config(checkpoint: "Checkpoint") -> None:
    """Raise BadCheckpoint if vlmo_config.json says other sizes than the tensors."""
    sizes = checkpoint.sizes
    pixels = grid_side(checkpoint) * patch_size(checkpoint)
    shown = {
        "embed_dim": sizes.hidden_size,
        "depth": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "image_size": pixels,
        "patch_size": patch_size(checkpoint),
        "vocab_size": sizes.vocab_size,
        "max_text_len": max_text_len(checkpoint),
    }
    said = read_optional_json(checkpoint.path / CONFIG)
    for name, size in shown.items():
        if said.get(name, size) != size:
            raise BadCheckpoint(
                f"{checkpoint.path}: {name} in {CONFIG} is {said[name]!r:.80}, but the weights are "
                f"of {size}; images are resized to the {pixels} pixels of the weights"
            )


def shape_of(checkpoint: "Checkpoint", name: str) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises BadCheckpoint if there is no such tensor."""
    if name not in checkpoint.tensors:
        raise BadCheckpoint(f"{checkpoint.path} has no tensor {name}: it is not a VLMo model")
    return checkpoint.tensors[name].shape


def heads_of(checkpoint: "Checkpoint", width: int, depth: int) -> int:
    """Return the number of attention heads, which no shape tells if there is no bias table."""
    said = read_optional_json(checkpoint.path / CONFIG).get("num_heads", KNOWN_HEADS.get(width))
    if BIAS_TABLE in checkpoint.tensors:
        said = shape_of(checkpoint, BIAS_TABLE)[-1] // max(depth, 1)
    if type(said) is not int or said < 1 or width % said:
        raise BadCheckpoint(
            f'{checkpoint.path}: give the number of heads in {CONFIG}: {{"num_heads": 12}}'
        )
    return said


def has_absolute_positions(checkpoint: "Checkpoint") -> bool:
    """Whether the model adds positions to its inputs, as base_plus does."""
    return IMAGE_POSITIONS in checkpoint.tensors


def max_text_len(checkpoint: "Checkpoint") -> int:
    """Return the length to which every text is padded or cut, in tokens."""
    return shape_of(checkpoint, "text_embeddings.position_embeddings.weight")[0]


def patch_size(checkpoint: "Checkpoint") -> int:
    """Return the pixels on a side of a patch."""
    return shape_of(checkpoint, "transformer.patch_embed.proj.weight")[-1]


def grid_side(checkpoint: "Checkpoint") -> int:
    """Return the patches on a side of an image, of which all have the same size.

    The table of positions tells it. Raises BadCheckpoint if it fits no square.
    """
    if has_absolute_positions(checkpoint):
        num_patches = shape_of(checkpoint, IMAGE_POSITIONS)[1] - 1
        side = math.isqrt(max(num_patches, 0))
        fits = side * side == num_patches
    else:
        num_entries = shape_of(checkpoint, BIAS_TABLE)[0]
        num_distances = num_entries - (2 * TEXT_REACH + 2) - IMAGE_ROLES
        side = (math.isqrt(max(num_distances, 0)) + 1) // 2
        fits = (2 * side - 1) ** 2 == num_distances
    if not fits or side < 1:
        raise BadCheckpoint(f"{checkpoint.path}: the table of positions fits no square image")
    return side


def special_id(checkpoint: "Checkpoint", token: str) -> int:
    """Return the id of a special token. Raises BadCheckpoint if the vocabulary lacks it."""
    file = checkpoint.path / Vlmo.vocabulary_file
    lines = read_file(file).decode(errors="replace").split("\n")
    if token not in lines:
        raise BadCheckpoint(f"{file} has no token {token}: it is not BERT's vocabulary")
    return lines.index(token)


def labels(checkpoint: "Checkpoint") -> tuple[str, ...]:
    """Return the answers that the classifier tells apart, in the order of its outputs.

    Raises BadCheckpoint if the file that lists them is missing, or does not fit the classifier.
    """
    file = checkpoint.path / LABELS
    count = shape_of(checkpoint, f"{CLASSIFIER}3.weight")[0]
    if not file.exists():
        raise BadCheckpoint(
            f'{checkpoint.path} lacks {LABELS}: give the {count} answers of the training, one {{"'
            'answer": TEXT, "label": NUMBER} a line'
        )
    found: dict[int, str] = {}
    for line in read_file(file).decode(errors="replace").splitlines():
        match parse_line(line):
            case {"answer": str(answer), "label": int(label)}:
                found[label] = answer
            case _:
                raise BadCheckpoint(f"{file}: {line[:80]!r} is no answer with its label")
    if sorted(found) != list(range(count)):
        raise BadCheckpoint(f"{file} must name each of the {count} labels of the classifier once")
    return tuple(found[label] for label in range(count))


def parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
