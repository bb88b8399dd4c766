"""Checkpoints of Qwen2.5-VL with random weights. `3b` and `7b` have the real shapes.

`3b-awq` has the same weights quantized; the same goes for each size and format.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.quantized import FORMATS, Format
from benchmarks.recipe import Recipe, Shape, write_json, write_safetensors
from common.settings import EMBEDDED_MODEL

# Files of the embedded model. Its bytes and special tokens come first in the vocabulary.
COPIED = ("generation_config.json", "tokenizer_config.json", "chat_template.json")
NUM_KNOWN_TOKENS = 278
MAX_PIXELS = 12845056


@dataclass(frozen=True)
class Shapes:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    mrope_section: tuple[int, int, int]
    tied: bool
    vision_depth: int
    vision_hidden_size: int
    vision_num_heads: int
    vision_intermediate_size: int
    fullatt_block_indexes: tuple[int, ...]


SHAPES = {
    "plumbing": Shapes(320, 128, 1, 2, 1, 128, (8, 12, 12), False, 1, 64, 2, 64, (0,)),
    "mid": Shapes(32000, 896, 24, 14, 2, 4864, (8, 12, 12), False, 12, 640, 8, 1712, (2, 5, 8, 11)),
    "3b": Shapes(
        151936, 2048, 36, 16, 2, 11008, (16, 24, 24), True, 32, 1280, 16, 3420, (7, 15, 23, 31)
    ),
    "7b": Shapes(
        152064, 3584, 28, 28, 4, 18944, (16, 24, 24), False, 32, 1280, 16, 3420, (7, 15, 23, 31)
    ),
}


def recipe(shapes: Shapes, format: Format | None = None) -> Recipe:
    """Return how a checkpoint is made, the layers of whose language model may be quantized."""

    def write_files(folder: Path) -> None:
        for file in COPIED:
            shutil.copy(EMBEDDED_MODEL / file, folder)
        config = config_of(shapes)
        if format is not None:
            config["quantization_config"] = format.config
        write_json(folder / "config.json", config)
        preprocessor = json.loads((EMBEDDED_MODEL / "preprocessor_config.json").read_text())
        write_json(folder / "preprocessor_config.json", preprocessor | {"max_pixels": MAX_PIXELS})
        write_json(folder / "tokenizer.json", tokenizer_of(shapes))

    def tensors() -> Iterator[tuple[str, Shape]]:
        yield from language_tensors(shapes)
        yield from vision_tensors(shapes)

    def store(name: str, value: Tensor) -> dict[str, Tensor]:
        if format is None or value.ndim < 2 or not name.startswith("model.layers."):
            return {name: value}
        module = name.removesuffix(".weight")
        return {f"{module}.{last}": tensor for last, tensor in format.store(value)[0].items()}

    # No greedy answer ends early.
    silent = (slice(NUM_KNOWN_TOKENS),)
    return Recipe(write_files, tensors, write_safetensors, "lm_head.weight", silent, store)


def config_of(shapes: Shapes) -> dict[str, Any]:
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    config |= {
        "vocab_size": shapes.vocab_size,
        "hidden_size": shapes.hidden_size,
        "num_hidden_layers": shapes.num_layers,
        "num_attention_heads": shapes.num_heads,
        "num_key_value_heads": shapes.num_kv_heads,
        "intermediate_size": shapes.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": shapes.num_layers,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": shapes.mrope_section},
        "tie_word_embeddings": shapes.tied,
        "torch_dtype": "bfloat16",
    }
    config["vision_config"] |= {
        "depth": shapes.vision_depth,
        "hidden_size": shapes.vision_hidden_size,
        "num_heads": shapes.vision_num_heads,
        "intermediate_size": shapes.vision_intermediate_size,
        "out_hidden_size": shapes.hidden_size,
        "fullatt_block_indexes": shapes.fullatt_block_indexes,
    }
    return config


def tokenizer_of(shapes: Shapes) -> dict[str, Any]:
    """Return the embedded model's tokenizer, with one word for each further token.

    Different tokens thus have different texts.
    """
    tokenizer = json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text())
    # Special tokens missing from the vocabulary would be numbered after its last word.
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["model"]["vocab"] |= special | {
        f"Ġw{i}": i for i in range(NUM_KNOWN_TOKENS, shapes.vocab_size)
    }
    return tokenizer


def language_tensors(shapes: Shapes) -> Iterator[tuple[str, Shape]]:
    hidden = shapes.hidden_size
    inner = shapes.intermediate_size
    head_dim = hidden // shapes.num_heads
    yield "model.embed_tokens.weight", (shapes.vocab_size, hidden)
    for i in range(shapes.num_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
        for x, heads in (
            ("q", shapes.num_heads),
            ("k", shapes.num_kv_heads),
            ("v", shapes.num_kv_heads),
        ):
            yield f"{layer}.self_attn.{x}_proj.weight", (heads * head_dim, hidden)
            yield f"{layer}.self_attn.{x}_proj.bias", (heads * head_dim,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, shapes.num_heads * head_dim)
        for x, shape in (
            ("gate", (inner, hidden)),
            ("up", (inner, hidden)),
            ("down", (hidden, inner)),
        ):
            yield f"{layer}.mlp.{x}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    if not shapes.tied:
        yield "lm_head.weight", (shapes.vocab_size, hidden)


def vision_tensors(shapes: Shapes) -> Iterator[tuple[str, Shape]]:
    hidden = shapes.vision_hidden_size
    inner = shapes.vision_intermediate_size
    merged = 4 * shapes.vision_hidden_size
    yield "visual.patch_embed.proj.weight", (hidden, 3, 2, 14, 14)
    for i in range(shapes.vision_depth):
        block = f"visual.blocks.{i}"
        for norm in ("norm1", "norm2"):
            yield f"{block}.{norm}.weight", (hidden,)
        linears = (
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        )
        for name, rows, columns in linears:
            yield f"{block}.{name}.weight", (rows, columns)
            yield f"{block}.{name}.bias", (rows,)
    yield "visual.merger.ln_q.weight", (hidden,)
    for name, rows in (("mlp.0", merged), ("mlp.2", shapes.hidden_size)):
        yield f"visual.merger.{name}.weight", (rows, merged)
        yield f"visual.merger.{name}.bias", (rows,)


RECIPES = {name: recipe(shapes) for name, shapes in SHAPES.items()} | {
    f"{size}-{name}": recipe(shapes, format)
    for size, shapes in SHAPES.items()
    for name, format in FORMATS.items()
}
