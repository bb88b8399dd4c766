"""Vocabularies in the format of tiktoken: a line with a token in base64 and its rank for each."""

import binascii
import json
from base64 import b64decode
from pathlib import Path
from typing import Any

from common.families.family import BadCheckpoint, TiktokenRules
from common.model_files import read_file
from common.vocabulary.byte_level import token_of
from common.vocabulary.tokenizer_json import added_token
from common.vocabulary.vocabulary import MAX_TOKEN_BYTES, MAX_TOKENS, Vocabulary


def read_tiktoken(
    file: Path, rules: TiktokenRules | None, num_ranks: int | None = None
) -> Vocabulary:
    """Read a tiktoken file, with what its family adds to it.

    Raises BadCheckpoint if the file is damaged, or has not `num_ranks` tokens, if that is known.
    """
    if rules is None:
        raise BadCheckpoint(f"{file}: the family has no rules for a tiktoken file")
    tokens = read_tokens(file)
    if num_ranks is not None and len(tokens) != num_ranks:
        raise BadCheckpoint(
            f"{file} has {len(tokens)} tokens, config.json needs {num_ranks}: they do not belong "
            "together; download both again"
        )
    special = dict(enumerate(rules.special_tokens, start=len(tokens)))
    special_bytes = {id: token.encode() for id, token in special.items()}
    return Vocabulary(
        file,
        json.dumps(describe(tokens, rules.split_pattern, special)),
        dict(enumerate(tokens)) | special_bytes,
        frozenset(special),
    )


def read_tokens(file: Path) -> list[bytes]:
    """Return the tokens in the order of their ranks."""
    ranks: dict[bytes, int] = {}
    try:
        for line in read_file(file).split(b"\n"):
            if line := line.strip():
                token, rank = line.split()
                ranks[b64decode(token, validate=True)] = int(rank)
    except BadCheckpoint:
        raise
    except (ValueError, binascii.Error) as e:
        raise BadCheckpoint(
            f"{file} is not a tiktoken file: {line[:80]!r} is not a token in base64 and its rank; "
            "download it again"
        ) from e
    if len(ranks) > MAX_TOKENS or max(map(len, ranks), default=0) > MAX_TOKEN_BYTES:
        raise BadCheckpoint(
            f"{file} has more than {MAX_TOKENS} tokens, or one of more than {MAX_TOKEN_BYTES} bytes"
        )
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise BadCheckpoint(f"{file} is damaged: it lacks ranks; download it again")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise BadCheckpoint(f"{file} is damaged: it lacks single bytes; download it again")
    return tokens


def describe(tokens: list[bytes], split_pattern: str, special: dict[int, str]) -> dict[str, Any]:
    """Return the same tokenizer as the content of a tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(id, content) for id, content in special.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": split_pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level_step(),
            ],
        },
        "post_processor": None,
        "decoder": byte_level_step(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken looks a piece of text up as a whole before it merges parts.
            "ignore_merges": True,
            "vocab": {token_of(token): rank for rank, token in enumerate(tokens)},
            "merges": merges_of(tokens),
        },
    }


def byte_level_step() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }


def merges_of(tokens: list[bytes]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that are joined, most urgent first.

    tiktoken joins any two neighbours whose bytes are a token, the one of the lowest rank first.
    """
    names = {token: token_of(token) for token in tokens}
    return [
        (names[token[:cut]], names[token[cut:]])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in names and token[cut:] in names
    ]
