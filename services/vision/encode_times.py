"""How long the tower takes, as measured: what preprocess chooses replicas by."""

from common.buckets import bucket_of, expected_seconds
from common.messages import MAX_BUCKETS

NEWEST_SHARE = 0.3
NOTABLE_CHANGE = 0.25


class EncodeTimes:
    """Seconds an image by its bucket, moving averages."""

    def __init__(self, buckets: tuple[int, ...] = ()) -> None:
        self.buckets = buckets
        self.seconds: dict[int, float] = {}
        self._told: dict[int, float] = {}

    def measured(self, num_patches: int, seconds: float) -> None:
        bucket = bucket_of(num_patches, self.buckets)
        if bucket in self.seconds or len(self.seconds) < MAX_BUCKETS:
            before = self.seconds.get(bucket, seconds)
            self.seconds[bucket] = before + NEWEST_SHARE * (seconds - before)

    def expected(self, num_patches: int) -> float:
        return expected_seconds(self.seconds, self.buckets, num_patches)

    def changed_notably(self) -> bool:
        """Since this was last asked with the answer yes."""
        changed = any(
            abs(now - self._told.get(bucket, 0.0)) > NOTABLE_CHANGE * now
            for bucket, now in self.seconds.items()
        )
        if changed:
            self._told = dict(self.seconds)
        return changed
