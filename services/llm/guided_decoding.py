"""Answers that follow a grammar: which tokens may come next, computed during the forward pass.

llguidance does the work.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from common.logs import get_logger
from common.messages import RequestKey
from common.vocabulary import Vocabulary

MAX_ERROR_CHARS = 200

Mask = np.ndarray
"""bool [vocab_size]: the tokens that may come next."""


class GuidedDecoding:
    """The grammars of the requests in progress.

    Preprocess has validated each grammar. Without llguidance it has refused the request. A grammar
    is compiled in a thread, because that may take seconds. The smallest one comes first, so that a
    large one does not hold up the others for longer than it takes itself.
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
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._waiting: dict[RequestKey, tuple[str, list[int]]] = {}
        """The grammars to compile, and the tokens that were drawn by them already."""
        self._compiling: tuple[RequestKey, Future[Any]] | None = None

    def add(self, key: RequestKey, grammar: str, token_ids: list[int] | None = None) -> None:
        """Have a request follow a grammar, after these tokens of earlier attempts.

        `take_compiled` returns the request when it can begin.
        """
        self._waiting[key] = grammar, token_ids or []
        self._compile_next()

    @property
    def is_compiling(self) -> bool:
        return bool(self._waiting)

    def take_compiled(self) -> list[tuple[RequestKey, str]]:
        """Return the requests whose grammars were compiled since the last call.

        With each comes what is wrong with its grammar; empty if the request can begin.
        """
        found = []
        while self._compiling is not None and self._compiling[1].done():
            key, future = self._compiling
            self._compiling = None
            if self._waiting.pop(key, None) is not None:  # otherwise the request has ended
                problem = problem_of(future)
                if not problem:
                    self._matchers[key] = future.result()
                found.append((key, problem))
            self._compile_next()
        return found

    def _compile_next(self) -> None:
        if self._compiling is None and self._waiting:
            key = min(self._waiting, key=lambda key: len(self._waiting[key][0]))
            self._compiling = key, self._compiler.submit(self._compile, *self._waiting[key])

    def _compile(self, grammar: str, token_ids: list[int]) -> Any:
        """Return the matcher of a grammar. Raises ValueError if it does not compile."""
        from llguidance import (  # an extra, and only needed for requests with a grammar
            LLMatcher,
            LLTokenizer,
        )

        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._read_vocabulary().grammar_tokenizer_json(),
                n_vocab=self.vocab_size,
                eos_token=list(self._eos_token_ids),
            )
        matcher = LLMatcher(self._tokenizer, grammar)
        if not matcher.is_error():
            matcher.consume_tokens(token_ids)
        if matcher.is_error():
            raise ValueError(f"the answer cannot follow the grammar: {reason_of(matcher)}")
        return matcher

    def copy(self, source: RequestKey, key: RequestKey) -> None:
        """Have a request follow the grammar of another one, from the same state on."""
        if matcher := self._matchers.get(source):
            self._matchers[key] = matcher.deep_copy()

    def remove(self, key: RequestKey) -> None:
        """Forget a request, which need not have a grammar."""
        self._waiting.pop(key, None)
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

    def failure_of(self, key: RequestKey) -> str:
        """Return why llguidance cannot go on with an answer; empty if it can, or it is complete."""
        matcher = self._matchers.get(key)
        if matcher is None or not matcher.is_error():
            return ""
        return f"the answer cannot follow the grammar: {reason_of(matcher)}"

    def _mask(self, matcher: Any) -> Mask:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self.vocab_size, bitorder="little").astype(bool)


def reason_of(matcher: Any) -> str:
    return " ".join(matcher.get_error().split())[:MAX_ERROR_CHARS]


def problem_of(compiled: "Future[Any]") -> str:
    """Return why a grammar could not be compiled; empty if it could."""
    error = compiled.exception()
    if error is None or isinstance(error, ValueError):
        return str(error or "")
    get_logger().error("a grammar could not be compiled", exc_info=error)
    return "the grammar could not be compiled: see the llm log"
