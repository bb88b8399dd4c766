"""The metrics of a preprocess service."""

from common.metrics import StageMetrics
from services.preprocess.vision_pool import VisionPool


class PreprocessMetrics(StageMetrics):
    """The metrics of one preprocess. `kind` is image or video."""

    def __init__(self, pool: VisionPool) -> None:
        super().__init__("preprocess")
        self.request_seconds = self.histogram(
            "request_seconds",
            "Seconds from the arrival of a request until its prompt goes to a language group.",
        )
        self.item_seconds = self.histogram(
            "item_seconds", "Seconds to decode, resize and hash one item.", "kind"
        )
        self.redispatches = self.counter(
            "redispatches",
            "Items that went back into the queue because their replica was lost or failed, or "
            "because the language group rejected the embeddings, by reason.",
            "reason",
        )
        self.gauge(
            "waiting_items", "Items that wait for a vision replica.", lambda: pool.num_waiting
        )
        for reason in ("lost", "failed", "rejected"):
            self.redispatches.labels(reason)
