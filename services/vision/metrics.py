"""What a vision replica counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.vision.cache import EmbeddingCache

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class VisionMetrics:
    def __init__(self, cache: EmbeddingCache) -> None:
        self.registry = registry = CollectorRegistry()
        self.images = Counter(
            "twinlens_vision_images",
            "Images, by how they ended: encoded, cached, joined, failed.",
            ["outcome"],
            registry=registry,
        )
        self.encode_seconds = Histogram(
            "twinlens_vision_encode_seconds",
            "In the tower, an image.",
            buckets=SECONDS,
            registry=registry,
        )
        self.wait_seconds = Histogram(
            "twinlens_vision_wait_seconds",
            "From an image's offer to the tower.",
            buckets=SECONDS,
            registry=registry,
        )
        self.patches = Counter(
            "twinlens_vision_patches", "Patches of encoded images.", registry=registry
        )
        self.padding_patches = Counter(
            "twinlens_vision_padding_patches",
            "Patches that were computed only to fill a bucket.",
            registry=registry,
        )
        cache_bytes = Gauge(
            "twinlens_vision_cache_bytes", "Embeddings kept for repeated images.", registry=registry
        )
        cache_bytes.set_function(lambda: cache.num_bytes)
