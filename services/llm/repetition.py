"""Answers that are caught in a loop. Imports no torch."""

from collections.abc import Iterable

import numpy as np

from common.messages import Repetition

NO_TOKEN = -1


class LoopGuard:
    """Notices that the last tokens of an answer are one pattern, several times in a row.

    It looks at token ids only, so however often an answer is resumed, the same token ends it. The
    cost of a token does not grow with the answer. It is that of a few operations on arrays of
    `max_pattern_size` numbers.
    """

    def __init__(self, repetition: Repetition, token_ids: Iterable[int] = ()) -> None:
        """Begin with the tokens that the answer has already, of all attempts."""
        most = repetition.max_pattern_size
        least = max(1, repetition.min_pattern_size)
        self._window = np.full(8 * most, NO_TOKEN, np.int64)
        """The last tokens, at the end of the part before `_end`."""
        self._end = most
        self._most = most
        self._least = least
        self._runs = np.zeros(most - least + 1, np.int64)
        """For each size of a pattern, from the largest on: how many of the last tokens in a row
        equal the token that is this far before them."""
        sizes = np.arange(most, least - 1, -1)
        self._wanted = sizes * (repetition.min_count - 1)
        self._num_safe = int(self._wanted.min())
        """No loop can be complete before this number of further tokens."""
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> bool:
        """Add a token to the answer, and return whether that is caught in a loop now."""
        if self._end == len(self._window):
            self._window[: self._most] = self._window[-self._most :]
            self._end = self._most
        end = self._end
        self._runs += 1
        self._runs *= self._window[end - self._most : end - self._least + 1] == token_id
        self._window[end] = token_id
        self._end += 1
        self._num_safe -= 1
        if self._num_safe > 0:
            return False
        self._num_safe = int((self._wanted - self._runs).min())
        return self._num_safe <= 0


def guard_of(repetition: Repetition | None, token_ids: Iterable[int]) -> LoopGuard | None:
    """Return the guard of an answer that has these tokens; None if loops may go on."""
    if repetition is None or not repetition.max_pattern_size:
        return None
    return LoopGuard(repetition, token_ids)
