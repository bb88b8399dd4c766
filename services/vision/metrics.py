"""The metrics of a vision replica."""

from collections.abc import Callable

from common.metrics import StageMetrics
from services.vision.cache import EmbeddingCache


class VisionMetrics(StageMetrics):
    """The metrics of one replica. `kind` is image or video."""

    def __init__(self, cache: EmbeddingCache) -> None:
        super().__init__("vision")
        self.offers = self.counter("offers", "Items that were offered, accepted or not.", "kind")
        self.items = self.counter(
            "items",
            "Items by outcome: encoded, cached, joined (an equal one was in work), failed.",
            *("kind", "outcome"),
        )
        self.item_tokens = self.counter(
            "item_tokens", "Embeddings (item tokens) that were delivered.", *("kind", "outcome")
        )
        self.wait_seconds = self.histogram(
            "wait_seconds", "Seconds from the offer of an item until its encoding began.", "kind"
        )
        self.encode_seconds = self.histogram(
            "encode_seconds", "Seconds that an item spent in the vision tower.", "kind"
        )
        self.item_seconds = self.histogram(
            "item_seconds", "Seconds from the offer of an item until its encoding ended.", "kind"
        )
        self.patches = self.counter("patches", "Patches of the items that were encoded.")
        self.padding_patches = self.counter(
            "padding_patches", "Patches that were computed only to fill a bucket."
        )
        self._watch_cache(cache)
        for outcome in ("encoded", "cached", "joined", "failed"):
            self.items.labels("image", outcome)

    def _watch_cache(self, cache: EmbeddingCache) -> None:
        self.gauge(
            "cache_bytes",
            "Bytes of embeddings that are cached for repeated items.",
            lambda: cache.num_bytes,
        )
        self.gauge("cache_capacity_bytes", "Size of the cache.", lambda: cache.max_bytes)
        self.gauge("cache_entries", "Items whose embeddings are cached.", lambda: len(cache))
        self.total(
            "cache_evictions",
            "Items whose embeddings made room for others.",
            lambda: cache.num_evicted,
        )

    def watch_load(self, load: Callable[[], tuple[int, int]]) -> None:
        """Add the gauge of what the replica holds, once there is a work loop that knows it."""
        self.gauge(
            "items_in_flight",
            "Items that were accepted and not delivered, or that wait for an equal one.",
            lambda: sum(load()),
        )
