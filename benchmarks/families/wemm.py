"""Checkpoints of WeMM-Chat-2k-CN with random weights, in the layout of the published files.

`wemm-mid` is smaller than the published model. Its heads have the real sizes, and the other sizes
the real proportions, except that images are made half as large.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.recipe import Recipe, Shape, layer_norm, linear, write_json, write_safetensors

VOCAB_SIZE = 32000
SPECIAL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    VOCAB_SIZE - 2: "<|im_end|>",
    VOCAB_SIZE - 1: "<|im_start|>",
}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""Types of SentencePiece's pieces."""
BPE = 2
FIRST_WORD = 259
"""Three special tokens and 256 bytes come before it."""
CONTEXT = 32768
WIDTH = 1024
LAYERS = 24
HEADS = 8
KEY_HEADS = 2
HEAD_DIM = 128
INNER = 3584
LOW_RANK = 128
TOWER_WIDTH = 576
TOWER_LAYERS = 12
TOWER_HEADS = 8
TOWER_INNER = 2152
TABLE_SIDE = 70
PATCH = 14
STRIDE = 4
SPLITTERS = 12
LONGEST_EDGE = 980
SHORTEST_EDGE = 378


def config() -> dict[str, Any]:
    return {
        "model_type": "wemm",
        "do_image_splitting": False,
        "torch_dtype": "bfloat16",
        "tokenizer_path": ".",
        "image_processor": {"size": {"shortest_edge": SHORTEST_EDGE, "longest_edge": LONGEST_EDGE}},
        "vision_config": {
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": TOWER_INNER,
            "num_hidden_layers": TOWER_LAYERS,
            "num_attention_heads": TOWER_HEADS,
            "num_channels": 3,
            "image_size": TABLE_SIDE * PATCH,
            "patch_size": PATCH,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "downsampler_config": {
            "kernel_size": STRIDE,
            "stride": STRIDE,
            "visual_hidden_size": TOWER_WIDTH,
            "llm_hidden_size": WIDTH,
            "depth": 2,
            "hidden_act": "gelu",
            "bias": False,
        },
        "spliter_emb_config": {"num_embeddings": SPLITTERS, "embedding_dim": WIDTH},
        "text_config": {
            "model_type": "internlm2",
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "max_position_embeddings": CONTEXT,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": KEY_HEADS,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "vocab_size": VOCAB_SIZE,
        },
    }


def write_files(folder: Path) -> None:
    write_json(folder / "config.json", config())
    write_json(folder / "adapter_config.json", {"lora_alpha": LOW_RANK, "r": LOW_RANK})
    write_json(folder / "lora_adapter.json", {"wemm": "."})
    added = {
        str(id): {"content": content, "special": True} for id, content in SPECIAL_TOKENS.items()
    }
    write_json(
        folder / "tokenizer_config.json", {"add_bos_token": True, "added_tokens_decoder": added}
    )
    (folder / "tokenizer.model").write_bytes(b"".join(vocabulary()))


def vocabulary() -> Iterator[bytes]:
    """Yield the parts of a SentencePiece model: special tokens, bytes, then different words."""
    yield piece("<unk>", UNKNOWN)
    yield piece("<s>", CONTROL)
    yield piece("</s>", CONTROL)
    for byte in range(256):
        yield piece(f"<0x{byte:02X}>", BYTE)
    for i in range(FIRST_WORD, VOCAB_SIZE - 2):
        yield piece(f"\u2581w{i}", NORMAL)
    yield message(2, field(3, BPE) + field(35, 1))


def piece(text: str, kind: int) -> bytes:
    score = varint(2 << 3 | 5) + struct.pack("<f", 0.0)
    return message(1, message(1, text.encode()) + score + field(3, kind))


def message(number: int, content: bytes) -> bytes:
    """A field of the wire format of Protocol Buffers that has a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    if value < 0x80:
        return bytes([value])
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def tensors() -> Iterator[tuple[str, Shape]]:
    yield "language_model.model.tok_embeddings.weight", (VOCAB_SIZE, WIDTH)
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}"
        yield f"{layer}.attention_norm.weight", (WIDTH,)
        yield f"{layer}.ffn_norm.weight", (WIDTH,)
        for name, num_outputs, num_inputs in (
            ("attention.wqkv", (HEADS + 2 * KEY_HEADS) * HEAD_DIM, WIDTH),
            ("attention.wo", WIDTH, HEADS * HEAD_DIM),
            ("feed_forward.w1", INNER, WIDTH),
            ("feed_forward.w3", INNER, WIDTH),
            ("feed_forward.w2", WIDTH, INNER),
        ):
            yield f"{layer}.{name}.original_linear.weight", (num_outputs, num_inputs)
            yield f"{layer}.{name}.Plora_A.weight", (LOW_RANK, num_inputs)
            yield f"{layer}.{name}.Plora_B.weight", (num_outputs, LOW_RANK)
    yield "language_model.model.norm.weight", (WIDTH,)
    yield "language_model.output.weight", (VOCAB_SIZE, WIDTH)
    yield from tower_tensors()
    yield "downsampler.group_op.weight", (WIDTH, TOWER_WIDTH, STRIDE, STRIDE)
    yield "downsampler.linear_model.1.weight", (WIDTH, WIDTH)
    yield "visual_source_spliter_emb.weight", (SPLITTERS, WIDTH)


def tower_tensors() -> Iterator[tuple[str, Shape]]:
    width = TOWER_WIDTH
    embeddings = "vision_tower.embeddings"
    yield f"{embeddings}.patch_embedding.weight", (width, 3, PATCH, PATCH)
    yield f"{embeddings}.patch_embedding.bias", (width,)
    yield f"{embeddings}.position_embedding.weight", (TABLE_SIDE**2, width)
    for i in range(TOWER_LAYERS):
        layer = f"vision_tower.encoder.layers.{i}"
        yield from layer_norm(f"{layer}.layer_norm1", width)
        yield from layer_norm(f"{layer}.layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", width, width)
        yield from linear(f"{layer}.mlp.fc1", TOWER_INNER, width)
        yield from linear(f"{layer}.mlp.fc2", width, TOWER_INNER)
    yield from layer_norm("vision_tower.post_layernorm", width)


RECIPES = {
    "wemm-mid": Recipe(
        write_files,
        tensors,
        write_safetensors,
        "language_model.output.weight",
        (slice(FIRST_WORD), slice(VOCAB_SIZE - 2, None)),
    )
}
