"""Room for image embeddings in the memory of rank 0. Imports no torch."""

from collections import OrderedDict

from common.cgroup import available_memory
from common.messages import RequestKey

MEMORY_SHARE = 0.125
"""Of what the host, or the container, has available."""


class EmbeddingBudget:
    """Given for all images of a request at once, in the order of arrival, until the request ends.
    So a request whose images are under way never waits for another one's: what it needs is its
    own already, and no later one overtakes the first that waits."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = self.num_free = num_tokens
        self._waiting: OrderedDict[RequestKey, tuple[int, str]] = OrderedDict()
        self._held: dict[RequestKey, int] = {}

    def add(self, key: RequestKey, num_tokens: int, owner: str) -> None:
        """A request with so many image tokens; its `owner` is told when there is room."""
        assert num_tokens <= self.num_tokens
        self._waiting[key] = (num_tokens, owner)

    def remove(self, key: RequestKey) -> None:
        """The request ended, wherever it stands."""
        self._waiting.pop(key, None)
        self.num_free += self._held.pop(key, 0)

    def take_reserved(self) -> list[tuple[RequestKey, str]]:
        """Those for which there is room since the last call, with their owners."""
        reserved = []
        while self._waiting:
            key, (num_tokens, owner) = next(iter(self._waiting.items()))
            if num_tokens > self.num_free:
                break
            del self._waiting[key]
            self.num_free -= num_tokens
            self._held[key] = num_tokens
            reserved.append((key, owner))
        return reserved


def embedding_tokens(kv_tokens: int, max_model_len: int, bytes_per_token: int) -> int:
    """As many image tokens as the KV cache holds, for those who run, and as many again for those
    who wait; an eighth of the host's available memory at most, but whatever one request may
    have."""
    return max(
        max_model_len, min(2 * kv_tokens, int(available_memory() * MEMORY_SHARE) // bytes_per_token)
    )
