"""Slots that clients share, such that what one client takes never refuses another."""

from collections import Counter

from common.errors import Exhausted


class FairShare:
    """A number of slots, of which a client gets at most half of what the others leave."""

    def __init__(self, total: int, reason: str) -> None:
        """Create the slots. `reason` is what a client is told that gets none."""
        self._total = total
        self._reason = reason
        self._held = Counter[str]()
        self._num_held = 0

    def take(self, client: str) -> None:
        """Take a slot for the client, or raise Exhausted."""
        left_by_others = self._total - (self._num_held - self._held[client])
        if self._held[client] + 1 > max(1, left_by_others // 2) or self._num_held >= self._total:
            raise Exhausted(self._reason, "gateway", retry_after=1.0, cause="too_many_calls")
        self._held[client] += 1
        self._num_held += 1

    def put_back(self, client: str) -> None:
        self._held[client] -= 1
        self._num_held -= 1
        if not self._held[client]:
            del self._held[client]
