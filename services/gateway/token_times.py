"""`token_timestamps`: when each token of an answer was made, as the vastgenx benchmark reads it."""

import time
from itertools import pairwise
from typing import Any

from services.gateway.generation import Began, GenerationEvent, Piece

Interval = list[int]
"""[begin, end] in microseconds since 1970, by the gateway's clock."""


class TokenTimes:
    """Collects the interval of each token.

    That of the first token is its prefill, as the language group measured it. That of any other
    token reaches from the arrival of the one before until its own. Tokens that arrive together
    share the time evenly.
    """

    def __init__(self) -> None:
        self._intervals: list[Interval] = []
        self._num_written = 0
        self._num_announced = 0
        """The tokens whose interval came before them: the first one, until its piece comes."""
        self._encode_seconds: float | None = None

    def note(self, event: GenerationEvent) -> None:
        """Note when an event of the answer arrived."""
        match event:
            case Began(timings=timings):
                now = time.time_ns() // 1000
                prefill = round(timings.get("prefill_seconds", 0.0) * 1e6)
                self._intervals.append([now - prefill, now])
                self._num_announced = 1
                if images := timings.get("images"):
                    self._encode_seconds = sum(each.get("encode_seconds", 0.0) for each in images)
            case Piece(token_ids=ids):
                self._add(len(ids))

    def _add(self, count: int) -> None:
        known = min(count, self._num_announced)
        self._num_announced -= known
        count -= known
        begin = self._intervals[-1][1]
        span = time.time_ns() // 1000 - begin
        bounds = [begin + span * n // count for n in range(count + 1)] if count else []
        self._intervals += [list(pair) for pair in pairwise(bounds)]

    def first(self) -> dict[str, Any]:
        """Return the fields of the first chunk.

        `vit_timestamp` is an interval in seconds, as long as the towers worked on the request's
        items. It ends where the prefill begins.
        """
        fields = self.next()
        if self._encode_seconds is None:
            return fields
        end = self._intervals[0][0] / 1e6
        return fields | {"custom_data": {"vit_timestamp": [end - self._encode_seconds, end]}}

    def next(self) -> dict[str, Any]:
        """Return the field of a chunk: the intervals that no chunk had before."""
        new = self._intervals[self._num_written :]
        self._num_written = len(self._intervals)
        return {"token_timestamps": new} if new else {}

    def whole(self) -> dict[str, Any]:
        """Return the field of an answer that is not streamed."""
        return {"token_timestamps": self._intervals}
