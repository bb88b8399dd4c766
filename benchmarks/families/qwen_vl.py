"""Checkpoints of Qwen-VL-Chat with random weights, in the layout of the published files.

`qwen-vl-mid` is smaller than the published model. Its heads have the real sizes, the other sizes
about the real proportions.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.recipe import Recipe, Shape, layer_norm, linear, write_json, write_safetensors

VOCAB_SIZE = 32000
NUM_SPECIAL_TOKENS = 217
NUM_RANKS = VOCAB_SIZE - NUM_SPECIAL_TOKENS
IMAGE_START = 214
"""Which of the special tokens <img> is."""
CONTEXT = 8192
WIDTH = 1024
LAYERS = 24
HEADS = 8
HEAD_DIM = 128
INNER = 2752
TOWER_WIDTH = 832
TOWER_LAYERS = 12
TOWER_HEADS = 8
TOWER_INNER = 4096
QUERIES = STORED_POSITIONS = 256


def config() -> dict[str, Any]:
    return {
        "model_type": "qwen",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "kv_channels": HEAD_DIM,
        "intermediate_size": 2 * INNER,
        "vocab_size": VOCAB_SIZE,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 2048,
        "max_position_embeddings": CONTEXT,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "visual": {
            "image_size": 448,
            "patch_size": 14,
            "width": TOWER_WIDTH,
            "layers": TOWER_LAYERS,
            "heads": TOWER_HEADS,
            "mlp_ratio": 4.9231,
            "output_dim": WIDTH,
            "image_start_id": NUM_RANKS + IMAGE_START,
        },
    }


def write_files(folder: Path) -> None:
    write_json(folder / "config.json", config())
    write_json(
        folder / "generation_config.json",
        {"chat_format": "chatml", "eos_token_id": NUM_RANKS, "max_new_tokens": 512},
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
    words = [f" w{i}".encode() for i in range(256, NUM_RANKS)]
    tokens = [bytes([byte]) for byte in range(256)] + words
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))


def tensors() -> Iterator[tuple[str, Shape]]:
    yield "transformer.wte.weight", (VOCAB_SIZE, WIDTH)
    for i in range(LAYERS):
        layer = f"transformer.h.{i}"
        heads = HEADS * HEAD_DIM
        yield f"{layer}.ln_1.weight", (WIDTH,)
        yield from linear(f"{layer}.attn.c_attn", 3 * heads, WIDTH)
        yield f"{layer}.attn.c_proj.weight", (WIDTH, heads)
        yield f"{layer}.ln_2.weight", (WIDTH,)
        yield f"{layer}.mlp.w1.weight", (INNER, WIDTH)
        yield f"{layer}.mlp.w2.weight", (INNER, WIDTH)
        yield f"{layer}.mlp.c_proj.weight", (WIDTH, INNER)
    yield "transformer.ln_f.weight", (WIDTH,)
    yield "lm_head.weight", (VOCAB_SIZE, WIDTH)
    for name, shape in tower_tensors():
        yield f"transformer.visual.{name}", shape


def tower_tensors() -> Iterator[tuple[str, Shape]]:
    width = TOWER_WIDTH
    yield "conv1.weight", (width, 3, 14, 14)
    yield "positional_embedding", (STORED_POSITIONS, width)
    yield from layer_norm("ln_pre", width)
    for i in range(TOWER_LAYERS):
        block = f"transformer.resblocks.{i}"
        yield from layer_norm(f"{block}.ln_1", width)
        yield from layer_norm(f"{block}.ln_2", width)
        yield from linear(f"{block}.attn.in_proj", 3 * width, width)
        yield from linear(f"{block}.attn.out_proj", width, width)
        yield from linear(f"{block}.mlp.c_fc", TOWER_INNER, width)
        yield from linear(f"{block}.mlp.c_proj", width, TOWER_INNER)
    yield "attn_pool.pos_embed", (STORED_POSITIONS, WIDTH)
    yield "attn_pool.query", (QUERIES, WIDTH)
    yield "attn_pool.kv_proj.weight", (WIDTH, width)
    yield "attn_pool.attn.in_proj_weight", (3 * WIDTH, WIDTH)
    yield "attn_pool.attn.in_proj_bias", (3 * WIDTH,)
    yield from linear("attn_pool.attn.out_proj", WIDTH, WIDTH)
    for norm in ("attn_pool.ln_q", "attn_pool.ln_kv", "ln_post"):
        yield from layer_norm(norm, WIDTH)
    yield "proj", (WIDTH, WIDTH)


RECIPES = {
    "qwen-vl-mid": Recipe(
        write_files,
        tensors,
        write_safetensors,
        "lm_head.weight",
        (slice(256), slice(NUM_RANKS, None)),
    )
}
