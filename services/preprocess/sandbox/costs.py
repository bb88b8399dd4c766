"""What jobs are expected to cost. That decides whose turn it is, and no more."""

LEAST_SECONDS = 1e-3
SECONDS_PER_BYTE = 1e-8
SECONDS_PER_PIXEL = 2e-8
BATCH_SECONDS = 0.03
"""Items are prepared together up to this cost: a message takes as long as a very small item."""


def item_seconds(num_bytes: int, size: tuple[int, int], num_images: int = 1) -> float:
    """Return the CPU time to prepare an item of a file of this length and (height, width).

    A video costs as much as `num_images` of that size.
    """
    height, width = size
    return SECONDS_PER_BYTE * num_bytes + SECONDS_PER_PIXEL * num_images * height * width
