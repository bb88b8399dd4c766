"""Shapes of items as a model may get them, found without knowing the family. Imports no torch."""

import math
from collections.abc import Iterator

from common.checkpoint import BadCheckpoint, Checkpoint
from services.vision.tower_thread import ItemShape

NUM_CHANNELS = 3


def sample_shape(checkpoint: Checkpoint, max_patches: int) -> ItemShape:
    """Return the shape of an item of at most this many patches, if possible nearly as many.

    Raises
    ------
    BadCheckpoint
        if no item of the model has so few patches.
    """
    for shape in shapes(checkpoint, max_patches):
        return shape
    raise BadCheckpoint(
        f"no image of {checkpoint.name} has {max_patches} patches or fewer: compile larger buckets"
    )


def shapes(checkpoint: Checkpoint, max_patches: int) -> Iterator[ItemShape]:
    """Yield the shapes of one step in time, nearly square ones first, that the family accepts.

    An item's content fills its grid. A patch is a square of pixels of three bytes.
    """
    family = checkpoint.family
    whole = checkpoint.patches_per_token
    side = math.isqrt(family.values_per_patch(checkpoint) // NUM_CHANNELS)
    for rows in range(math.isqrt(max_patches), 0, -1):
        for columns in range(max_patches // rows, rows - 1, -1):
            grid = (1, rows, columns)
            content = (rows * side, columns * side)
            if rows * columns % whole == 0 and not family.objection_to_shape(
                checkpoint, grid, content
            ):
                yield ItemShape(grid, content)
