"""How pixels are cut into patches, as most families do it."""

import numpy as np

from common.item_hash import item_hash
from common.messages import ItemKind
from services.preprocess.prepared import ReadyItem


def patches(rgb: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """Cut uint8 [height, width, 3] into uint8 [num_patches, 3 * patch_size * patch_size].

    The patches that the tower merges into one token stand together: patches are ordered by (merge
    row, merge column, row inside, column inside), and the values of one by (channel, y, x).
    """
    height, width = (side // patch_size // merge_size for side in rgb.shape[:2])
    cells = rgb.reshape(height, merge_size, patch_size, width, merge_size, patch_size, 3)
    rows = np.ascontiguousarray(cells.transpose(0, 3, 1, 4, 6, 2, 5))
    return rows.reshape(-1, 3 * patch_size * patch_size)


def square_item(
    fingerprint: str, kind: ItemKind, pixels: np.ndarray, patch_size: int, num_tokens: int
) -> ReadyItem:
    """Return an image without padding, uint8 [height, width, 3], of a tower that merges nothing."""
    height, width, _ = pixels.shape
    rows = patches(pixels, patch_size, 1)
    grid = (1, height // patch_size, width // patch_size)
    size = (height, width)
    mm_hash = item_hash(fingerprint, kind, grid, size, rows.data)
    return ReadyItem(kind, mm_hash, grid, size, len(rows), num_tokens, rows)
