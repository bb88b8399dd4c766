"""Which tokens an answer prefers and may not have, as both APIs say it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.messages import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_LOGIT_BIAS,
    MAX_NGRAM_SIZE,
    TokenRules,
)
from common.wire import Tensor
from services.gateway.invalid_field import InvalidField

MAX_TOKEN_ID = 2**31 - 1
"""No vocabulary is this large. Preprocess knows the model's, and refuses what is outside it."""


def make_token_rules(
    logit_bias: Mapping[str, float] | Mapping[int, float] | None,
    allowed_token_ids: Sequence[int] | None,
    bad_words: Sequence[str] | None,
    no_repeat_ngram_size: int | None = None,
) -> TokenRules | None:
    """Return the values as TokenRules, or None if they ask for nothing.

    Raises
    ------
    InvalidField
        if a value is out of range, or there are too many.
    """
    size = no_repeat_ngram_size or 0
    if not logit_bias and allowed_token_ids is None and not bad_words and not size:
        return None
    if not 0 <= size <= MAX_NGRAM_SIZE:
        raise InvalidField("no_repeat_ngram_size", f"{size} is outside [0, {MAX_NGRAM_SIZE}]")
    biases = read_biases(logit_bias or {})
    return TokenRules(
        bias_token_ids=Tensor.of_int64([*biases]) if biases else None,
        bias_values=Tensor.of(np.array([*biases.values()], np.float32)) if biases else None,
        allowed_token_ids=None if allowed_token_ids is None else read_allowed(allowed_token_ids),
        bad_words=read_words(bad_words) if bad_words else None,
        no_repeat_ngram_size=size,
    )


def read_ngram_size(size: int | None, arguments: Mapping[str, Any] | None) -> int | None:
    """Return `no_repeat_ngram_size` of a chat, or that of its `vllm_xargs`.

    MinerU's client sends it there, for a plugin of vLLM. Its `debug` is about that plugin's log.

    Raises
    ------
    InvalidField
        if `vllm_xargs` has anything else, or the two differ.
    """
    for name, value in (arguments or {}).items():
        if name == "no_repeat_ngram_size" and type(value) is int and size in (None, value):
            size = value
        elif name != "debug" and value is not None:
            raise InvalidField(
                f"vllm_xargs.{name[:60]}", "this value is not supported; leave it out"
            )
    return size


def read_biases(logit_bias: Mapping[str, float] | Mapping[int, float]) -> dict[int, float]:
    """Return the biases by token id. OpenAI's clients send the ids as text."""
    if len(logit_bias) > MAX_BIASES:
        raise InvalidField("logit_bias", f"more than {MAX_BIASES} tokens; send fewer")
    biases: dict[int, float] = {}
    for name, bias in logit_bias.items():
        if not is_token_id(str(name)):
            raise InvalidField("logit_bias", f"{str(name)[:40]!r} is not a token id")
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            bounds = f"[-{MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}]"
            raise InvalidField("logit_bias", f"{bias} of token {name} is outside {bounds}")
        biases[int(name)] = bias
    return biases


def is_token_id(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= 10 and int(name) <= MAX_TOKEN_ID


def read_allowed(token_ids: Sequence[int]) -> Tensor:
    """Return the different ids among those that are allowed."""
    if not token_ids:
        raise InvalidField(
            "allowed_token_ids", "no token is allowed; name some, or leave the field out"
        )
    if not 0 <= min(token_ids) <= max(token_ids) <= MAX_TOKEN_ID:
        raise InvalidField("allowed_token_ids", f"a token id is outside [0, {MAX_TOKEN_ID}]")
    return Tensor.of(np.unique(np.array(token_ids, np.int64)))


def read_words(bad_words: Sequence[str]) -> Tensor:
    """Return the different texts as JSON."""
    words = list(dict.fromkeys(bad_words))
    if len(words) > MAX_BAD_WORDS:
        raise InvalidField("bad_words", f"more than {MAX_BAD_WORDS} texts; send fewer")
    for word in words:
        if not 1 <= len(word) <= MAX_BAD_WORD_CHARS:
            problem = f"a text has {len(word)} characters; send 1 to {MAX_BAD_WORD_CHARS}"
            raise InvalidField("bad_words", problem)
    return Tensor.of_text(json.dumps(words))
