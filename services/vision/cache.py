"""The embeddings of items that were encoded before, bounded in bytes."""

from collections import OrderedDict

from common.wire import Tensor


class EmbeddingCache:
    """Maps an item's content to its embeddings [num_item_tokens, width].

    The content is named by its hash and the dtype. The least recently used entries go first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        """Entries that made room for others."""
        self._entries: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, content: str) -> Tensor | None:
        if content not in self._entries:
            return None
        self._entries.move_to_end(content)
        return self._entries[content]

    def put(self, content: str, embeddings: Tensor) -> None:
        """Keep the embeddings, unless they alone are larger than the cache."""
        if embeddings.nbytes > self.max_bytes or content in self._entries:
            return
        self._entries[content] = embeddings
        self.num_bytes += embeddings.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.nbytes
            self.num_evicted += 1

    def drop(self, content: str) -> None:
        """Forget the embeddings of this content, because they were rejected."""
        if entry := self._entries.pop(content, None):
            self.num_bytes -= entry.nbytes
