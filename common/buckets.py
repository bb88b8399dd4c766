"""Buckets of patch counts.

A static-shape tower pads items to its buckets. For any other tower, times are measured by powers of
two.
"""

from common.config import BadSetting
from common.errors import shorten
from common.messages import MAX_BUCKETS

MAX_BUCKET_PATCHES = 2**20


def bucket_of(num_patches: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest bucket that holds an item; 0 if none does.

    Without buckets it is the next power of two.
    """
    if buckets:
        return next((bucket for bucket in buckets if bucket >= num_patches), 0)
    return 1 << (num_patches - 1).bit_length()


def expected_seconds(
    measured: dict[int, float], buckets: tuple[int, ...], num_patches: int
) -> float:
    """Return the expected seconds in the tower, from seconds `measured` by bucket.

    If the item's bucket was not measured, they are extrapolated from the nearest measured bucket.
    They are 0 if nothing was measured yet.
    """
    bucket = bucket_of(num_patches, buckets)
    if not measured or bucket in measured:
        return measured.get(bucket, 0.0)
    nearest = min(measured, key=lambda other: abs(other - bucket))
    return measured[nearest] * bucket / nearest


def parse_buckets(
    text: str, patches_per_token: int, flag: str = "--vision-buckets"
) -> tuple[int, ...]:
    """Read the buckets that a flag lists, and return them in rising order.

    They are patch counts, and multiples of `patches_per_token`.

    Raises
    ------
    BadSetting
    """
    try:
        buckets = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        buckets = (0,)
    is_bad = any(
        not 1 <= bucket <= MAX_BUCKET_PATCHES or bucket % patches_per_token for bucket in buckets
    )
    if is_bad or len(buckets) > MAX_BUCKETS:
        raise BadSetting(
            f"{flag} {shorten(text)}: give at most {MAX_BUCKETS} numbers of patches "
            f"separated by commas, multiples of {patches_per_token} of at most {MAX_BUCKET_PATCHES}"
        )
    return buckets
