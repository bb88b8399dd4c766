"""Which tokens a request prefers and may not have. Imports no torch."""

from collections.abc import Iterable

import msgspec
import numpy as np

from common.messages import MAX_BAD_WORDS, MAX_BIASES, MAX_LOGIT_BIAS, TokenRules
from common.wire import Tensor

MAX_SEQUENCES_BYTES = 1024 * 1024
NO_IDS = np.zeros(0, np.int64)


def objection_to_rules(rules: TokenRules | None, vocab_size: int) -> str:
    """Return why the rules of a prompt cannot be followed; "" if they can."""
    if rules is None:
        return ""
    ids = rules.bias_token_ids
    values = rules.bias_values
    if (ids is None) != (values is None):
        return "bias_token_ids and bias_values do not fit each other"
    if ids is not None and values is not None:
        if objection := objection_to_ids("bias_token_ids", ids, vocab_size, MAX_BIASES):
            return objection
        if values.dtype != "float32" or values.shape != ids.shape:
            return f"bias_values is {values}, float32 {ids.shape} is wanted"
        if not np.all(np.abs(values.numpy()) <= MAX_LOGIT_BIAS):
            return f"bias_values has a value outside [-{MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}]"
    allowed = rules.allowed_token_ids
    if allowed is not None and (
        objection := objection_to_ids("allowed_token_ids", allowed, vocab_size, vocab_size)
    ):
        return objection
    return objection_to_words(rules.bad_words, vocab_size)


def objection_to_ids(name: str, tensor: Tensor, vocab_size: int, most: int) -> str:
    if tensor.dtype != "int64" or len(tensor.shape) != 1 or not 1 <= tensor.shape[0] <= most:
        return f"{name} is {tensor}, int64 [1 to {most}] is wanted"
    token_ids = tensor.numpy()
    if not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        return f"{name} has a value outside [0, {vocab_size})"
    # An edit of the logits sets each place once.
    return f"{name} names a token twice" if len(np.unique(token_ids)) < len(token_ids) else ""


def objection_to_words(words: Tensor | None, vocab_size: int) -> str:
    if words is None:
        return ""
    if words.dtype != "uint8" or words.nbytes > MAX_SEQUENCES_BYTES:
        return f"bad_words is {words}, at most {MAX_SEQUENCES_BYTES} bytes of JSON are taken"
    try:
        sequences = sequences_of(words)
    except msgspec.MsgspecError as e:
        return f"bad_words: {e}"
    if len(sequences) > 2 * MAX_BAD_WORDS or not all(sequences):
        return f"bad_words has an empty sequence, or more than {2 * MAX_BAD_WORDS}"
    if any(not 0 <= token_id < vocab_size for sequence in sequences for token_id in sequence):
        return f"bad_words has a token outside [0, {vocab_size})"
    return ""


def sequences_of(words: Tensor) -> list[list[int]]:
    """Return the token sequences of `bad_words`. Raises MsgspecError if it holds none."""
    return msgspec.json.decode(words.data, type=list[list[int]])


class BadWords:
    """The token sequences that an answer may not have, and the end of the answer."""

    def __init__(self, sequences: Iterable[list[int]], output_token_ids: list[int]) -> None:
        """`output_token_ids` are the tokens that the answer has already, of all attempts."""
        self._single: list[int] = []
        self._endings: dict[int, list[tuple[list[int], int]]] = {}
        """By the last but one token of a sequence: what stands before the last one, and that."""
        self._longest = 1
        for *before, last in sequences:
            if before:
                self._endings.setdefault(before[-1], []).append((before, last))
                self._longest = max(self._longest, len(before))
            else:
                self._single.append(last)
        self._tail = output_token_ids[-self._longest :]

    def record(self, token_id: int) -> None:
        """Add a token to the answer."""
        self._tail.append(token_id)
        del self._tail[: -self._longest]

    def banned(self) -> np.ndarray:
        """Return the tokens that would complete a sequence, int64 [n]."""
        candidates = self._endings.get(self._tail[-1], []) if self._tail else []
        found = [last for before, last in candidates if self._tail[-len(before) :] == before]
        return np.array(self._single + found, np.int64)


class Ngrams:
    """The sequences of one length in an answer, none of which may come twice."""

    def __init__(self, size: int, output_token_ids: list[int]) -> None:
        """`output_token_ids` are the tokens that the answer has already, of all attempts."""
        self._size = size
        self._tail: list[int] = []
        """The last tokens of the answer, one less than a sequence has."""
        self._followers: dict[tuple[int, ...], set[int]] = {}
        """By what stands before it: the last tokens of the sequences so far."""
        for token_id in output_token_ids:
            self.record(token_id)

    def record(self, token_id: int) -> None:
        """Add a token to the answer."""
        if len(self._tail) == self._size - 1:
            self._followers.setdefault(tuple(self._tail), set()).add(token_id)
        self._tail.append(token_id)
        del self._tail[: len(self._tail) - (self._size - 1)]

    def banned(self) -> np.ndarray:
        """Return the tokens that would complete a sequence for the second time, int64 [n]."""
        return np.array(sorted(self._followers.get(tuple(self._tail), ())), np.int64)


class RulesInForce:
    """The TokenRules of a request in progress, in the form that the sampler applies."""

    def __init__(self, rules: TokenRules, output_token_ids: list[int]) -> None:
        ids = rules.bias_token_ids.numpy() if rules.bias_token_ids else NO_IDS
        values = rules.bias_values.numpy() if rules.bias_values else NO_IDS.astype(np.float32)
        is_inner = np.abs(values) < MAX_LOGIT_BIAS
        self.bias_ids = ids[is_inner]
        """int64 [n]: the tokens whose logits are changed by `bias_values`."""
        self.bias_values = values[is_inner]
        """float32 [n]."""
        self.forced_ids = ids[values >= MAX_LOGIT_BIAS]
        """int64 [n]: if one of these can be drawn, nothing else can."""
        self.allowed_ids = (
            rules.allowed_token_ids.numpy().copy() if rules.allowed_token_ids else None
        )
        """int64 [n]: the only tokens that may be drawn; None for all."""
        self._never_ids = ids[values <= -MAX_LOGIT_BIAS]
        sequences = sequences_of(rules.bad_words) if rules.bad_words else []
        self._histories: list[BadWords | Ngrams] = []
        """What depends on the tokens of the answer so far."""
        if sequences:
            self._histories.append(BadWords(sequences, output_token_ids))
        if rules.no_repeat_ngram_size:
            self._histories.append(Ngrams(rules.no_repeat_ngram_size, output_token_ids))

    @property
    def narrows(self) -> bool:
        """Whether some tokens are the only ones that may be drawn."""
        return self.allowed_ids is not None or bool(self.forced_ids.size)

    def record(self, token_id: int) -> None:
        """Note the token that was drawn."""
        for history in self._histories:
            history.record(token_id)

    def banned_ids(self) -> np.ndarray:
        """Return the tokens that may not be drawn next, int64 [n]."""
        if not self._histories:
            return self._never_ids
        found = [history.banned() for history in self._histories]
        return np.concatenate([self._never_ids, *found])
