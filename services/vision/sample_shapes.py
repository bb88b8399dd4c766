"""Shapes of items as a model may get them, found without knowing the family. Imports no torch."""

import math
from collections.abc import Iterator

from common.checkpoint import Checkpoint
from services.vision.tower_thread import ItemShape

NUM_CHANNELS = 3


def shapes(checkpoint: Checkpoint, max_patches: int) -> Iterator[ItemShape]:
    """Yield shapes of at most `max_patches` patches, nearly square and large ones first.

    They have one step in time, and the family accepts them.
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
