"""The metrics of a preprocess service."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.preprocess.vision_pool import VisionPool

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class PreprocessMetrics:
    """The counters and times, and two numbers that are read from the pool."""

    def __init__(self, pool: VisionPool) -> None:
        self.registry = registry = CollectorRegistry()
        self.image_seconds = Histogram(
            "twinlens_preprocess_image_seconds",
            "Seconds to decode, resize and hash one image.",
            buckets=SECONDS,
            registry=registry,
        )
        self.failed_dispatches = Counter(
            "twinlens_preprocess_failed_dispatches",
            "Image attempts that a vision replica failed.",
            registry=registry,
        )
        waiting = Gauge(
            "twinlens_preprocess_waiting_images",
            "Images that wait for a vision replica.",
            registry=registry,
        )
        waiting.set_function(lambda: pool.num_waiting)
        queue = Gauge(
            "twinlens_vision_queue_seconds",
            "Seconds that the waiting images add before another image would begin.",
            registry=registry,
        )
        queue.set_function(lambda: pool.queue_seconds)
