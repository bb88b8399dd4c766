"""Room for the embeddings of items in the memory of rank 0. Imports no torch."""

from heapq import heappop, heappush

from common.cgroup import available_memory
from common.messages import RequestKey

MEMORY_SHARE = 0.125
"""The share of the memory available to the host or container."""


class EmbeddingBudget:
    """Reserves room for all items of a request at once, in the order of priority and arrival.

    A request keeps its room until it ends. So a request whose items are being encoded never waits
    for another request, and no later request overtakes the first that waits, unless it is more
    urgent.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = self.num_free = num_tokens
        self._waiting: dict[RequestKey, tuple[int, str]] = {}
        self._queue: list[tuple[int, int, RequestKey]] = []
        """A heap of (priority, number of the arrival, request), also of requests that have ended
        meanwhile."""
        self._num_added = 0
        self._held: dict[RequestKey, int] = {}

    def add(self, key: RequestKey, num_tokens: int, owner: str, priority: int = 0) -> None:
        """Queue a request with this number of item tokens. `owner` is notified of the room.

        Requests with a lower `priority` come first.
        """
        assert num_tokens <= self.num_tokens
        self._waiting[key] = (num_tokens, owner)
        heappush(self._queue, (priority, self._num_added, key))
        self._num_added += 1

    def remove(self, key: RequestKey) -> None:
        """Forget a request that ended, whether it waits or holds room."""
        self._waiting.pop(key, None)
        self.num_free += self._held.pop(key, 0)

    def take_reserved(self) -> list[tuple[RequestKey, str]]:
        """Return the requests that got room since the last call, with their owners."""
        reserved = []
        while self._queue:
            key = self._queue[0][2]
            num_tokens, owner = self._waiting.get(key, (0, ""))
            if num_tokens > self.num_free:
                break
            heappop(self._queue)
            if self._waiting.pop(key, None) is None:
                continue  # it has ended
            self.num_free -= num_tokens
            self._held[key] = num_tokens
            reserved.append((key, owner))
        return reserved


def embedding_tokens(kv_tokens: int, max_model_len: int, bytes_per_token: int) -> int:
    """Return the number of item tokens for which there is room.

    It is twice the tokens of the KV cache, for requests that run and for requests that wait. It is
    limited by a share of the available memory, but always holds what one request may have.
    """
    most = int(available_memory() * MEMORY_SHARE) // bytes_per_token
    return max(max_model_len, min(2 * kv_tokens, most))
