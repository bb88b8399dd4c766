"""Reads the vocabulary of an uncased BERT: a file with one token a line."""

import json
from pathlib import Path

from common.families.family import BadCheckpoint
from common.model_files import read_file
from common.vocabulary.tokenizer_json import added_token
from common.vocabulary.vocabulary import MAX_TOKENS, Vocabulary

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUES = "##"
"""What begins a token that continues a word."""
MAX_WORD_CHARS = 100
"""Longer words are unknown."""


def read_wordpiece(file: Path) -> Vocabulary:
    """Read the tokens. Raises BadCheckpoint if the file is damaged."""
    tokens = lines_of(file)
    # Of a token that occurs twice, the last one counts.
    ids = {token: id for id, token in enumerate(tokens)}
    if missing := [token for token in SPECIAL_TOKENS if token not in ids]:
        raise BadCheckpoint(f"{file} is not BERT's vocabulary: it lacks {', '.join(missing)}")
    if len(tokens) > MAX_TOKENS:
        raise BadCheckpoint(f"{file} has more than {MAX_TOKENS} tokens")
    special = {ids[token]: token for token in SPECIAL_TOKENS}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(id, token) for id, token in sorted(special.items())],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": CONTINUES,
            "max_input_chars_per_word": MAX_WORD_CHARS,
            "vocab": ids,
        },
    }
    pieces = {id: text_of(token).encode() for id, token in enumerate(tokens)}
    return Vocabulary(file, json.dumps(described), pieces, frozenset(special))


def lines_of(file: Path) -> list[str]:
    """Return the lines of a vocabulary file, which are its tokens. Raises BadCheckpoint."""
    try:
        return read_file(file).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as e:
        raise BadCheckpoint(f"{file} is not UTF-8 text") from e


def text_of(token: str) -> str:
    """Return what a token adds to a text: words are separated by spaces."""
    if token.startswith(CONTINUES):
        return token.removeprefix(CONTINUES)
    return token if token in SPECIAL_TOKENS else f" {token}"
