"""Answers that follow a grammar: which tokens may come next, computed during the forward pass.

llguidance does the work.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from common.messages import RequestKey
from common.vocabulary import Vocabulary

MAX_ERROR_CHARS = 200

Mask = np.ndarray
"""bool [vocab_size]: the tokens that may come next."""


class GuidedDecoding:
    """The grammars of the requests in progress.

    Preprocess has validated each grammar. Without llguidance it has refused the request.
    """

    def __init__(
        self,
        read_vocabulary: Callable[[], Vocabulary],
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """`read_vocabulary` is called at the first grammar, because most services get none.

        `vocab_size` is the number of logits, which may exceed the number of tokens.
        """
        self._read_vocabulary = read_vocabulary
        self.vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: Any = None
        self._matchers: dict[RequestKey, Any] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="guided-decoding")

    def add(self, key: RequestKey, grammar: str) -> None:
        """Have a request follow a grammar.

        Raises
        ------
        ValueError
            if it does not compile.
        """
        from llguidance import (  # an extra, and only needed for requests with a grammar
            LLMatcher,
            LLTokenizer,
        )

        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._read_vocabulary().tokenizer_json,
                n_vocab=self.vocab_size,
                eos_token=list(self._eos_token_ids),
            )
        matcher = LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:MAX_ERROR_CHARS]
            raise ValueError(f"the grammar does not compile: {reason}")
        self._matchers[key] = matcher

    def remove(self, key: RequestKey) -> None:
        """Forget a request, which need not have a grammar."""
        self._matchers.pop(key, None)

    def begin_masks(self, keys: list[RequestKey]) -> dict[int, "Future[Mask]"]:
        """Start to compute the masks of the next tokens of the requests that have a grammar.

        Returns them by their row in `keys`.
        """
        return {
            row: self._pool.submit(self._mask, self._matchers[key])
            for row, key in enumerate(keys)
            if key in self._matchers
        }

    def accept(self, key: RequestKey, token_id: int) -> bool:
        """Advance by the token that was drawn. Returns False if the answer is now complete."""
        matcher = self._matchers.get(key)
        if matcher is None:
            return True
        matcher.consume_token(token_id)
        return not matcher.is_stopped()

    def _mask(self, matcher: Any) -> Mask:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self.vocab_size, bitorder="little").astype(bool)
