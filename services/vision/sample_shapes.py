"""Shapes of items as a model may get them, found without knowing the family. Imports no torch."""

import math
from collections.abc import Iterator
from itertools import islice

from common.checkpoint import Checkpoint
from common.messages import ItemKind
from services.vision.tower_thread import ItemShape

NUM_CHANNELS = 3
VIDEO_STEPS = (1, 2, 3)
"""The steps in time of the videos among the samples."""
NUM_SAMPLES = 4
"""The samples of each kind and number of steps."""
SMALL_PATCHES = 256
"""The patches of a small image. They fill more than one tile of attention."""


def small_image(checkpoint: Checkpoint, max_patches: int) -> ItemShape | None:
    """Return the shape of an image of about SMALL_PATCHES patches, or of the next larger size.

    None if the family accepts no image of at most `max_patches`.
    """
    limit = min(SMALL_PATCHES, max_patches)
    while (shape := next(shapes(checkpoint, limit), None)) is None and limit < max_patches:
        limit = min(2 * limit, max_patches)
    return shape


def samples(checkpoint: Checkpoint, max_patches: int) -> Iterator[ItemShape]:
    """Yield some shapes of at most `max_patches` patches for each kind of item, images first."""
    for kind in sorted(checkpoint.family.placeholder_ids(checkpoint)):
        for steps in (1,) if kind == "image" else VIDEO_STEPS:
            yield from islice(shapes(checkpoint, max_patches, kind, steps), NUM_SAMPLES)


def shapes(
    checkpoint: Checkpoint, max_patches: int, kind: ItemKind = "image", steps: int = 1
) -> Iterator[ItemShape]:
    """Yield shapes of at most `max_patches` patches, nearly square and large ones first.

    They have `steps` steps in time, and the family accepts them. An item's content fills its grid.
    A patch is a square of pixels of three bytes.
    """
    family = checkpoint.family
    whole = checkpoint.patches_per_token
    frames = family.frames_per_patch(checkpoint, kind)
    side = math.isqrt(family.values_per_patch(checkpoint) // NUM_CHANNELS)
    most = max_patches // steps
    for rows in range(math.isqrt(most), 0, -1):
        for columns in range(most // rows, rows - 1, -1):
            grid = (steps, rows, columns)
            content = (rows * side, columns * side)
            is_whole = math.prod(grid) % whole == 0
            if is_whole and not family.objection_to_shape(checkpoint, grid, content):
                yield ItemShape(grid, content, kind, frames)
