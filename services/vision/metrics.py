"""The metrics of a vision replica."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.vision.cache import EmbeddingCache

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class VisionMetrics:
    """All metrics of one replica, in a registry of their own."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self.registry = registry = CollectorRegistry()
        self.images = Counter(
            "twinlens_vision_images",
            "Images by outcome: encoded, cached, joined (an equal one was in work), failed.",
            ["outcome"],
            registry=registry,
        )
        self.encode_seconds = Histogram(
            "twinlens_vision_encode_seconds",
            "Seconds that an image spent in the vision tower.",
            buckets=SECONDS,
            registry=registry,
        )
        self.wait_seconds = Histogram(
            "twinlens_vision_wait_seconds",
            "Seconds from the offer of an image until its encoding began.",
            buckets=SECONDS,
            registry=registry,
        )
        self.patches = Counter(
            "twinlens_vision_patches", "Patches of the images that were encoded.", registry=registry
        )
        self.padding_patches = Counter(
            "twinlens_vision_padding_patches",
            "Patches computed only to fill a bucket.",
            registry=registry,
        )
        cache_bytes = Gauge(
            "twinlens_vision_cache_bytes",
            "Bytes of embeddings cached for repeated images.",
            registry=registry,
        )
        cache_bytes.set_function(lambda: cache.num_bytes)
