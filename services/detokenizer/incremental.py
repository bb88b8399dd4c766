"""Token ids to text, a few at a time, and stop strings in the text.

The result equals what the tokenizer makes of the whole answer at once.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from common.vocabulary import Vocabulary

# JSON has no infinity; this is what OpenAI's interface says instead.
LOWEST_LOGPROB = -9999.0


class IncrementalDecoder:
    """The text of one answer.

    The pieces that `push` and `finish` return, joined, are the decoded answer up to its end or
    right before the first stop string, or right after it. What `push` returned is certain: no later
    token changes it. Two things are held back: the bytes of an incomplete character, and text that
    may become a stop string. Both are bounded, so the cost of a token does not grow with the
    answer.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """Begin an answer.

        A stop string that is complete before the `min_tokens`-th token does not end it.
        `include_stop` says whether the stop string that ends it belongs to it.
        """
        assert all(stop)
        self.num_tokens = 0
        """The number of tokens so far. After a stop it is the number up to and including the token
        that completed the stop string."""
        self.stopped = False
        """Whether a stop string has ended the answer."""
        self._vocabulary = vocabulary
        self._stop = stop
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""
        self._num_strippable = vocabulary.max_stripped_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(vocabulary.decode_errors)

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that has become certain. Tokens after a stop string are ignored."""
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """Return the text that was held back and belongs to the answer after all."""
        if self.stopped:
            return ""
        text = self._advance(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _push_one(self, token_id: int) -> str:
        if self.stopped:
            return ""
        self.num_tokens += 1
        data = self._vocabulary.visible_bytes(token_id, self._skip_special_tokens)
        return self._advance(self._utf8.decode(data))

    def _advance(self, new: str) -> str:
        """Add decoded text, and return the text that has become certain."""
        if self._num_strippable:
            new = self._strip(new)
        if not self._stop or not new:
            return new
        text = self._held + new
        if self.num_tokens >= self._min_tokens:
            found = first_stop(text, self._stop, num_searched=len(self._held))
            if found is not None:
                self.stopped = True
                self._held = ""
                start, end = found
                return text[: end if self._include_stop else start]
        certain = len(text) - max(num_held(text, stop) for stop in self._stop)
        self._held = text[certain:]
        return text[:certain]

    def _strip(self, new: str) -> str:
        """Drop the tokenizer's spaces from the start of the answer."""
        num_spaces = len(new) - len(new.lstrip(" "))
        stripped = new[min(num_spaces, self._num_strippable) :]
        self._num_strippable = 0 if stripped else self._num_strippable - num_spaces
        return stripped


def first_stop(text: str, stop: Sequence[str], num_searched: int) -> tuple[int, int] | None:
    """Return where the earliest stop string begins and ends, or None if there is none.

    The first `num_searched` characters were searched before. Only stop strings that end after them
    count. Of two that begin at the same place, the shorter one is found.
    """
    found = [(text.find(one, max(0, num_searched - len(one) + 1)), len(one)) for one in stop]
    places = [(start, start + length) for start, length in found if start >= 0]
    return min(places, default=None)


def num_held(text: str, stop: str) -> int:
    """Return how many characters at the end of the text may be the beginning of the stop string."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def logprob_entry(
    vocabulary: Vocabulary, token_id: int, logprob: float, top: Iterable[tuple[int, float]] = ()
) -> dict[str, Any]:
    """Return an entry of OpenAI's `logprobs.content`, with the token ids, which gRPC clients get.

    `top` holds the ids and log-probabilities of the most likely tokens, the best one first.
    """
    best = [logprob_of(vocabulary, *candidate) for candidate in top]
    return logprob_of(vocabulary, token_id, logprob) | {"top_logprobs": best}


def logprob_of(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    """Return what OpenAI's interface says about one token, and its id."""
    data = vocabulary.token_bytes(token_id)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(data),
        "token_id": token_id,
    }
