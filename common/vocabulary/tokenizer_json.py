"""Vocabularies in the format of Hugging Face: tokenizer.json with byte-level BPE."""

from pathlib import Path
from typing import Any

from common.checkpoint import read_json
from common.families.family import BadCheckpoint
from common.vocabulary.byte_level import bytes_of
from common.vocabulary.vocabulary import Vocabulary


def read_tokenizer_json(file: Path) -> Vocabulary:
    """Read a tokenizer.json. Raises BadCheckpoint if it is damaged or not byte-level BPE."""
    config = read_json(file)
    try:
        return vocabulary_of(file, config)
    except (KeyError, TypeError, AttributeError) as e:
        raise BadCheckpoint(f"{file} is not a tokenizer.json: download it again") from e


def vocabulary_of(file: Path, config: dict[str, Any]) -> Vocabulary:
    decoder = (config.get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        raise BadCheckpoint(
            f"{file} has the decoder {decoder}, which is not supported yet; supported: ByteLevel"
        )
    added = config.get("added_tokens") or []
    tokens = {id: token for token, id in config["model"]["vocab"].items()}
    tokens |= {entry["id"]: entry["content"] for entry in added}
    return Vocabulary(
        file,
        file.read_text(encoding="utf-8"),
        {id: bytes_of(token) for id, token in tokens.items()},
        frozenset(entry["id"] for entry in added if entry["special"]),
    )


def added_token(token_id: int, content: str) -> dict[str, Any]:
    """Return the entry of a special token in tokenizer.json."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
