"""Vocabularies in the format of SentencePiece: tokenizer.model, and the special tokens next to it.

The special tokens are in tokenizer_config.json and special_tokens_map.json.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from common.families.family import BadCheckpoint
from common.model_files import read_optional_json
from common.vocabulary.sentencepiece_model import (
    ModelPiece,
    ModelType,
    PieceType,
    SentencePieceModel,
    read_model,
)
from common.vocabulary.tokenizer_json import added_token
from common.vocabulary.vocabulary import MAX_TOKENS, ONE_MARK_PER_BYTE, Vocabulary

SPACE = "\u2581"
"""What pieces have in the place of a space."""
ALL_SPACES = 2**31 - 1
SINGLE_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_sentencepiece(file: Path) -> Vocabulary:
    """Read a model file and its special tokens.

    Raises BadCheckpoint if a file is damaged, or the model is neither BPE nor Unigram.
    """
    model = read_model(file)
    if model.model_type not in (ModelType.BPE, ModelType.UNIGRAM):
        raise BadCheckpoint(
            f"{file} is a model of type {model.model_type.name}, which is not supported; "
            "supported: BPE, UNIGRAM"
        )
    special = special_tokens(file, model)
    names = names_of(file, model, special)
    pieces = {id: piece_bytes(piece) for id, piece in enumerate(model.pieces)}
    special_bytes = {id: content.encode() for id, content in special.items()}
    return Vocabulary(
        file,
        json.dumps(describe(model, names, special)),
        pieces | special_bytes,
        frozenset(special),
        ONE_MARK_PER_BYTE,
        max_stripped_spaces(model),
    )


def max_stripped_spaces(model: SentencePieceModel) -> int:
    """Return how many spaces SentencePiece drops at the start of a decoded text."""
    return ALL_SPACES if model.remove_extra_whitespaces else int(model.add_dummy_prefix)


def piece_bytes(piece: ModelPiece) -> bytes:
    """Return the bytes that a piece adds to an answer."""
    if piece.type is PieceType.BYTE:
        return bytes([int(piece.text[1:-1], 16)])  # <0x0A>
    return piece.text.replace(SPACE, " ").encode()


def special_tokens(file: Path, model: SentencePieceModel) -> dict[int, str]:
    """Return the special tokens by id: of the model itself, and of the files next to it."""
    special = {
        id: piece.text
        for id, piece in enumerate(model.pieces)
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
    }
    special |= added_tokens(file.with_name("tokenizer_config.json"))
    ids = {piece.text: id for id, piece in enumerate(model.pieces)}
    ids |= {content: id for id, content in special.items()}
    for content in named_tokens(file.with_name("special_tokens_map.json")):
        if content not in ids:
            ids[content] = max(ids.values()) + 1
        special[ids[content]] = content
    return special


def added_tokens(file: Path) -> dict[int, str]:
    """Return the special tokens of a tokenizer_config.json by id."""
    entries = read_optional_json(file).get("added_tokens_decoder") or {}
    try:
        tokens = {int(id): entry["content"] for id, entry in entries.items() if entry["special"]}
        is_sound = all(0 <= id < MAX_TOKENS and content for id, content in tokens.items())
        is_text = all(isinstance(content, str) for content in tokens.values())
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BadCheckpoint(f"{file} has malformed added_tokens_decoder: download it again") from e
    if not is_sound or not is_text:
        raise BadCheckpoint(
            f"{file} has malformed added_tokens_decoder: its ids are from 0 to {MAX_TOKENS - 1}, "
            "and its tokens are texts"
        )
    return tokens


def named_tokens(file: Path) -> list[str]:
    """Return the tokens of a special_tokens_map.json, where each is a text or an object."""
    config = read_optional_json(file)
    found = [config.get(name) for name in SINGLE_SPECIAL_TOKENS]
    found += config.get("additional_special_tokens") or []
    tokens = [token.get("content") if isinstance(token, dict) else token for token in found]
    if not all(token is None or isinstance(token, str) for token in tokens):
        raise BadCheckpoint(f"{file} names a token that is not a text")
    return [token for token in tokens if token]


def names_of(file: Path, model: SentencePieceModel, special: dict[int, str]) -> list[str]:
    """Return the name of each id. A special token replaces the unused piece that had its id."""
    by_id = {id: piece.text for id, piece in enumerate(model.pieces)} | special
    names = [by_id.get(id, "") for id in range(max(by_id) + 1)]
    if len(by_id) != len(names) or len(set(names)) != len(names):
        raise BadCheckpoint(
            f"{file} and the tokenizer_config.json next to it do not agree: an id has no token, or "
            "a token has two ids; download both again"
        )
    return names


def describe(
    model: SentencePieceModel, names: list[str], special: dict[int, str]
) -> dict[str, Any]:
    """Return the same tokenizer as the content of a tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(id, content) for id, content in sorted(special.items())],
        "normalizer": {"type": "Sequence", "normalizers": normalizers_of(model)},
        "pre_tokenizer": split_at(user_defined(model, special)),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders_of(model)},
        "model": unigram(model, names)
        if model.model_type is ModelType.UNIGRAM
        else bpe(model, names, special),
    }


def normalizers_of(model: SentencePieceModel) -> list[dict[str, Any]]:
    """Return the steps that text goes through before it is split, in their order."""
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append(replace({"Regex": r"\A +| +\z"}, ""))
        steps.append(replace({"Regex": " {2,}"}, " "))
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    if model.escape_whitespaces:
        steps.append(replace({"String": " "}, SPACE))
    return steps


def decoders_of(model: SentencePieceModel) -> list[dict[str, Any]]:
    """Return the steps that turn tokens into text."""
    steps: list[dict[str, Any]] = [
        replace({"String": SPACE}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if count := max_stripped_spaces(model):
        steps.append({"type": "Strip", "content": " ", "start": count, "stop": 0})
    return steps


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def user_defined(model: SentencePieceModel, special: dict[int, str]) -> list[str]:
    """Return the pieces that are found in a text before any others, the longest first."""
    found = [
        piece.text
        for id, piece in enumerate(model.pieces)
        if piece.type is PieceType.USER_DEFINED and id not in special
    ]
    return sorted(found, key=len, reverse=True)


def split_at(texts: list[str]) -> dict[str, Any] | None:
    """Return the step that keeps these texts whole; the first one wins if several match."""
    if not texts:
        return None
    pattern = "|".join(re.escape(text) for text in texts)
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def bpe(model: SentencePieceModel, names: list[str], special: dict[int, str]) -> dict[str, Any]:
    unknown = unknown_id(model)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else names[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        # A user-defined piece stands alone here. No merges lead to it.
        "ignore_merges": bool(user_defined(model, special)),
        "vocab": {name: id for id, name in enumerate(names)},
        "merges": merges_of(model, special),
    }


def merges_of(model: SentencePieceModel, special: dict[int, str]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that are joined, most urgent first.

    SentencePiece joins any two neighbours whose text is a piece. The highest score goes first.
    """
    scores = {
        piece.text: piece.score
        for id, piece in enumerate(model.pieces)
        if piece.type is PieceType.NORMAL and id not in special
    }
    return [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


def unigram(model: SentencePieceModel, names: list[str]) -> dict[str, Any]:
    scores = [piece.score for piece in model.pieces] + [0.0] * (len(names) - len(model.pieces))
    return {
        "type": "Unigram",
        "unk_id": unknown_id(model),
        "byte_fallback": model.byte_fallback,
        "vocab": list(zip(names, scores, strict=True)),
    }


def unknown_id(model: SentencePieceModel) -> int | None:
    """Return the id of the piece that stands for text that no other piece matches."""
    return next((id for id, p in enumerate(model.pieces) if p.type is PieceType.UNKNOWN), None)
