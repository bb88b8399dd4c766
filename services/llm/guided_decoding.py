"""Answers that must follow a grammar: which tokens may come next, computed beside the forward pass.
llguidance does the work."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.messages import RequestKey

Mask = np.ndarray
"""bool [vocab_size]: the tokens that may come next."""


class GuidedDecoding:
    """The grammars of the requests under way. Preprocess has validated each, and refused those of
    services without llguidance."""

    def __init__(
        self, tokenizer_file: Path, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: Any = None
        self._matchers: dict[RequestKey, Any] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="guides")

    def add(self, key: RequestKey, grammar: str) -> None:
        from llguidance import (  # an extra, and only wanted by requests that bring a grammar
            LLMatcher,
            LLTokenizer,
        )

        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._tokenizer_file.read_text(),
                n_vocab=self._vocab_size,
                eos_token=list(self._eos_token_ids),
            )
        self._matchers[key] = LLMatcher(self._tokenizer, grammar)

    def remove(self, key: RequestKey) -> None:
        self._matchers.pop(key, None)

    def begin_masks(self, keys: list[RequestKey]) -> dict[int, "Future[Mask]"]:
        """Starts to compute the masks of the next tokens; by row of `keys`, for the requests that
        have a grammar."""
        return {
            row: self._pool.submit(self._mask, self._matchers[key])
            for row, key in enumerate(keys)
            if key in self._matchers
        }

    def accept(self, key: RequestKey, token_id: int) -> bool:
        """Takes the token that was drawn. False where the grammar says that the answer is
        complete."""
        matcher = self._matchers.get(key)
        if matcher is None:
            return True
        matcher.consume_token(token_id)
        return not matcher.is_stopped()

    def _mask(self, matcher: Any) -> Mask:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)
