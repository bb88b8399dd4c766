"""How long the tower takes per item, as measured. Preprocess chooses replicas by it."""

from common.buckets import bucket_of, expected_seconds
from common.messages import MAX_BUCKETS

NEWEST_SHARE = 0.3
"""The weight of the newest measurement in the moving average."""
NOTABLE_CHANGE = 0.25
"""The relative change that preprocess must be told about."""


class EncodeTimes:
    """Moving averages of the seconds per item, by bucket."""

    def __init__(self, buckets: tuple[int, ...] = ()) -> None:
        self.buckets = buckets
        self.seconds: dict[int, float] = {}
        self._reported: dict[int, float] = {}

    def record(self, num_patches: int, seconds: float) -> None:
        """Add a measurement. A new bucket is ignored if there are MAX_BUCKETS already."""
        bucket = bucket_of(num_patches, self.buckets)
        if bucket in self.seconds or len(self.seconds) < MAX_BUCKETS:
            before = self.seconds.get(bucket, seconds)
            self.seconds[bucket] = before + NEWEST_SHARE * (seconds - before)

    def expected(self, num_patches: int) -> float:
        """Return the seconds that an item should take; 0 if nothing was measured yet."""
        return expected_seconds(self.seconds, self.buckets, num_patches)

    def changed_notably(self) -> bool:
        """Whether an average has changed notably since the last call that returned True."""
        changed = any(
            abs(now - self._reported.get(bucket, 0.0)) > NOTABLE_CHANGE * now
            for bucket, now in self.seconds.items()
        )
        if changed:
            self._reported = dict(self.seconds)
        return changed
