"""Vocabularies in the format of Hugging Face: tokenizer.json with byte-level BPE."""

from pathlib import Path
from typing import Any

from common.families.family import BadCheckpoint
from common.model_files import parse_json, read_file, shown
from common.vocabulary.byte_level import bytes_of
from common.vocabulary.vocabulary import MAX_TOKENS, Vocabulary


def read_tokenizer_json(file: Path) -> Vocabulary:
    """Read a tokenizer.json. Raises BadCheckpoint if it is damaged or not byte-level BPE."""
    data = read_file(file)
    config = parse_json(data, str(file))
    decoder = (config.get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        raise BadCheckpoint(
            f"{file} has the decoder {shown(decoder)}, which is not supported yet; supported: "
            "ByteLevel"
        )
    added = config.get("added_tokens") or []
    tokens = {id: token for token, id in config["model"]["vocab"].items()}
    tokens |= {entry["id"]: entry["content"] for entry in added}
    for id, token in tokens.items():
        if type(id) is not int or not 0 <= id < MAX_TOKENS or not isinstance(token, str):
            raise BadCheckpoint(
                f"{file} has the token {shown(token)} with the id {shown(id)}: ids are integers "
                f"from 0 to {MAX_TOKENS - 1}"
            )
    return Vocabulary(
        file,
        data.decode(),
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
