"""Checks of the TokenRules of a Submit, and the token sequences of texts that are ruled out."""

import json

import numpy as np

from common.errors import InvalidRequest
from common.messages import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_LOGIT_BIAS,
    TokenRules,
)
from common.vocabulary import Vocabulary
from common.wire import Buffer, Tensor

MAX_WORDS_BYTES = MAX_BAD_WORDS * (6 * MAX_BAD_WORD_CHARS + 4)
"""JSON writes a character as 6 bytes at most."""


def check_token_rules(rules: TokenRules, vocab_size: int) -> None:
    """Raise InvalidRequest if the rules name a token outside the vocabulary, or are malformed."""
    if (rules.bias_token_ids is None) != (rules.bias_values is None):
        raise InvalidRequest("logit_bias: its ids or its values are missing")
    if rules.bias_token_ids is not None and rules.bias_values is not None:
        check_ids("logit_bias", rules.bias_token_ids, vocab_size, MAX_BIASES)
        check_biases(rules.bias_values, rules.bias_token_ids.shape)
    if rules.allowed_token_ids is not None:
        check_ids("allowed_token_ids", rules.allowed_token_ids, vocab_size, vocab_size)
    words = rules.bad_words
    if words is not None and (words.dtype != "uint8" or words.nbytes > MAX_WORDS_BYTES):
        raise InvalidRequest(f"bad_words: more than {MAX_WORDS_BYTES} bytes; send fewer texts")


def check_ids(name: str, tensor: Tensor, vocab_size: int, most: int) -> None:
    if tensor.dtype != "int64" or len(tensor.shape) != 1 or not tensor.shape[0]:
        raise InvalidRequest(f"{name} must be a list of token ids")
    token_ids = tensor.numpy()
    outside = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
    if outside.size:
        raise InvalidRequest(
            f"{name}: token {outside[0]} is outside the model's vocabulary of {vocab_size}"
        )
    if len(token_ids) > most or len(np.unique(token_ids)) < len(token_ids):
        raise InvalidRequest(f"{name}: more than {most} tokens, or one of them twice")


def check_biases(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != "float32" or tensor.shape != shape:
        raise InvalidRequest("logit_bias: each token needs one value")
    # A comparison with NaN is false.
    if not np.all(np.abs(tensor.numpy()) <= MAX_LOGIT_BIAS):
        raise InvalidRequest(
            f"logit_bias: a value is outside [-{MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}]"
        )


def word_sequences(vocabulary: Vocabulary, words: Buffer) -> list[list[int]]:
    """Return the token sequences that spell the texts of a JSON list.

    They are those of each text without leading white space, both within a word and after a space.
    Other sequences of tokens may spell the same text. They are not ruled out.

    Raises InvalidRequest if the texts are not a list of texts.
    """
    sequences = []
    for word in texts_of(words):
        text = word.lstrip() or word
        inside = vocabulary.encode(text, continues=True)
        after_space = vocabulary.encode(" " + text, continues=True)
        sequences.append(inside)
        # Otherwise `inside` rules out the word after a space, too.
        if after_space[-len(inside) :] != inside:
            sequences.append(after_space)
    return [sequence for sequence in sequences if sequence]


def texts_of(words: Buffer) -> list[str]:
    try:
        texts = json.loads(bytes(words))
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("bad_words is not valid JSON") from e
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequest("bad_words must be a list of texts")
    if len(texts) > MAX_BAD_WORDS or max(map(len, texts), default=0) > MAX_BAD_WORD_CHARS:
        raise InvalidRequest(
            f"bad_words: at most {MAX_BAD_WORDS} texts of {MAX_BAD_WORD_CHARS} characters"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as e:
        raise InvalidRequest("bad_words: half of a surrogate pair; send valid Unicode") from e
    return texts
