"""Embeddings of images that were encoded before, bounded in bytes."""

from collections import OrderedDict

from common.wire import Tensor


class EmbeddingCache:
    """Image content, named by mm_hash and dtype -> [num_image_tokens, hidden_size]; the least
    recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, mm_hash: str) -> Tensor | None:
        if mm_hash not in self._entries:
            return None
        self._entries.move_to_end(mm_hash)
        return self._entries[mm_hash]

    def put(self, mm_hash: str, embeddings: Tensor) -> None:
        if embeddings.nbytes > self.max_bytes or mm_hash in self._entries:
            return
        self._entries[mm_hash] = embeddings
        self.num_bytes += embeddings.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def drop(self, mm_hash: str) -> None:
        """What it has is no good."""
        if entry := self._entries.pop(mm_hash, None):
            self.num_bytes -= entry.nbytes
