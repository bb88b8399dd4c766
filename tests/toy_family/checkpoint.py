"""Makes a checkpoint of the toy family with random weights."""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.toy_family.description import (
    LOW_RANK,
    MODEL_TYPE,
    SPECIAL_TOKENS,
    VOCABULARY_FILE,
)

WIDTH = 32
INNER = 48
BLOCKS = 2
HEADS = 4
KEY_HEADS = 2
HEAD_WIDTH = 16
WORDS = 320
CONTEXT = 512
PATCH = 8
PATCHES_PER_TOKEN = 3
EYE_WIDTH = 24
MERGES = ("th", "he", "in", "er", "an", "re", " t", " a", "the", " the", "ing", "and")
END_ID, PICTURE_ID, _ = (256 + len(MERGES) + i for i in range(len(SPECIAL_TOKENS)))
TEMPLATE = (
    "{%- for message in messages %}<turn>{{ message.role }}: "
    "{%- if message.content is string %}{{ message.content }}{% else %}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' %}<picture>{% else %}{{ part.text }}{% endif %}"
    "{%- endfor %}{% endif %}<end>{% endfor %}<turn>assistant: "
)
CONFIG = {
    "model_type": MODEL_TYPE,
    "dtype": "float32",
    "width": WIDTH,
    "inner": INNER,
    "blocks": BLOCKS,
    "heads": HEADS,
    "key_heads": KEY_HEADS,
    "head_width": HEAD_WIDTH,
    "words": WORDS,
    "context": CONTEXT,
    "picture_id": PICTURE_ID,
    "eos_token_id": END_ID,
    "eye": {"patch": PATCH, "patches_per_token": PATCHES_PER_TOKEN, "width": EYE_WIDTH},
}


def make_checkpoint(folder: Path) -> Path:
    """Write a model directory, equal each time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in MERGES]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / VOCABULARY_FILE).write_bytes(b"".join(lines))
    save_file(weights(), folder / "model.safetensors")
    return folder


def weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(11)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, columns, generator=random) / columns**0.5

    def norm(width: int) -> Tensor:
        return 1 + 0.1 * torch.randn(width, generator=random)

    q_rows = HEADS * HEAD_WIDTH
    kv_rows = KEY_HEADS * HEAD_WIDTH
    made = {"stem.words": matrix(WORDS, WIDTH, 5.0), "stem.out": matrix(WORDS, WIDTH, 3.0)}
    made["stem.norm"] = norm(WIDTH)
    for block in range(BLOCKS):
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows, "gate": INNER, "up": INNER}
        columns = {"o": q_rows, "down": INNER}
        own = {"norm_1": norm(WIDTH), "norm_2": norm(WIDTH)}
        own |= {name: matrix(count, WIDTH) for name, count in rows.items()}
        own |= {f"{name}.low_up": matrix(count, LOW_RANK) for name, count in rows.items()}
        own |= {f"{name}.low_down": matrix(LOW_RANK, WIDTH) for name in ("qkv", "mlp")}
        own |= {name: matrix(WIDTH, count) for name, count in columns.items()}
        own |= {f"{name}.low_up": matrix(WIDTH, LOW_RANK) for name in columns}
        own |= {f"{name}.low_down": matrix(LOW_RANK, count) for name, count in columns.items()}
        made |= {f"block.{block}.{name}": tensor for name, tensor in own.items()}
    num_values = 3 * PATCH * PATCH
    made["eye.look"] = matrix(EYE_WIDTH, num_values)
    made["eye.mix"] = matrix(EYE_WIDTH, EYE_WIDTH)
    made["eye.tell"] = matrix(WIDTH, EYE_WIDTH * PATCHES_PER_TOKEN, 2.0)
    return {f"toy.{name}": tensor for name, tensor in made.items()}
