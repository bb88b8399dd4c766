"""Checkpoints of VLMo with random weights, named and laid out as the published files.

All have the real shapes of the models that answer questions about images of 480 x 480 pixels.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.recipe import Recipe, Shape, layer_norm, linear

VOCAB_SIZE = 30522
MAX_TEXT = 40
NUM_LABELS = 3129
PATCH = 16
IMAGE = 480
TEXT_DISTANCES = 2 * 196 + 2
"""Rows of the bias table for texts: distances, to and from the first token, and that alone."""
SPECIAL_TOKENS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789?.,!'"


@dataclass(frozen=True)
class Shapes:
    size: str
    width: int
    depth: int
    num_heads: int
    first_joint: int
    """The first layer with an expert for text and image together."""
    has_bias: bool
    """Whether attention has a relative bias and layers a scale; else positions are absolute."""


SHAPES = {
    "vlmo-base": Shapes("base", 768, 12, 12, 10, True),
    "vlmo-base-plus": Shapes("base_plus", 544, 24, 16, 21, False),
    "vlmo-large": Shapes("large", 1024, 24, 16, 21, True),
}


def recipe(shapes: Shapes) -> Recipe:
    def write_weights(folder: Path, recipe: Recipe) -> None:
        values = {name: recipe.values(name, shape) for name, shape in recipe.tensors()}
        torch.save(values, folder / f"vlmo_{shapes.size}_patch{PATCH}_{IMAGE}_vqa.pt")

    return Recipe(write_files, lambda: tensors(shapes), write_weights, "vqa_classifier.3.weight")


def write_files(folder: Path) -> None:
    words = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    words += [f"w{i}" for i in range(VOCAB_SIZE - len(words) - len(SPECIAL_TOKENS))]
    rest = iter(words)
    lines = [SPECIAL_TOKENS.get(id) or next(rest) for id in range(VOCAB_SIZE)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    answers = [json.dumps({"answer": f"answer {i}", "label": i}) for i in range(NUM_LABELS)]
    (folder / "answer2label.txt").write_text("\n".join(answers) + "\n")


def tensors(shapes: Shapes) -> Iterator[tuple[str, Shape]]:
    width = shapes.width
    side = IMAGE // PATCH
    yield "transformer.cls_token", (1, 1, width)
    yield "transformer.patch_embed.proj.weight", (width, 3, PATCH, PATCH)
    yield "transformer.patch_embed.proj.bias", (width,)
    if not shapes.has_bias:
        yield "transformer.pos_embed", (1, side**2 + 1, width)
    for i in range(shapes.depth):
        yield from block_tensors(shapes, i)
    yield from layer_norm("transformer.norm", width)
    if shapes.has_bias:
        num_distances = (2 * side - 1) ** 2 + 3 + TEXT_DISTANCES
        yield "relative_position_bias_table", (num_distances, shapes.num_heads * shapes.depth)
    yield "text_embeddings.word_embeddings.weight", (VOCAB_SIZE, width)
    yield "text_embeddings.position_embeddings.weight", (MAX_TEXT, width)
    yield "text_embeddings.token_type_embeddings.weight", (2, width)
    yield from layer_norm("text_embeddings.LayerNorm", width)
    yield "token_type_embeddings.weight", (2, width)
    yield from linear("pooler.dense", width, width)
    yield from linear("vqa_classifier.0", 2 * width, width)
    yield from layer_norm("vqa_classifier.1", 2 * width)
    yield from linear("vqa_classifier.3", NUM_LABELS, 2 * width)


def block_tensors(shapes: Shapes, index: int) -> Iterator[tuple[str, Shape]]:
    width = shapes.width
    block = f"transformer.blocks.{index}"
    if shapes.has_bias:
        yield f"{block}.gamma_1", (width,)
        yield f"{block}.gamma_2", (width,)
    yield from layer_norm(f"{block}.norm1", width)
    yield f"{block}.attn.q_bias", (width,)
    yield f"{block}.attn.v_bias", (width,)
    yield f"{block}.attn.qkv.weight", (3 * width, width)
    yield from linear(f"{block}.attn.proj", width, width)
    for expert in ("text", "imag", "vl"):
        if expert != "vl" or index >= shapes.first_joint:
            yield from layer_norm(f"{block}.norm2_{expert}", width)
            yield from linear(f"{block}.mlp_{expert}.fc1", 4 * width, width)
            yield from linear(f"{block}.mlp_{expert}.fc2", width, 4 * width)


RECIPES = {name: recipe(shapes) for name, shapes in SHAPES.items()}
