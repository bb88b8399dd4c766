"""How pixels are cut into patches, as most families do it."""

import numpy as np


def patches(rgb: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """Cut uint8 [height, width, 3] into uint8 [num_patches, 3 * patch_size * patch_size].

    The patches that the tower merges into one token stand together: patches are ordered by (merge
    row, merge column, row inside, column inside), and the values of one by (channel, y, x).
    """
    height, width = (side // patch_size // merge_size for side in rgb.shape[:2])
    cells = rgb.reshape(height, merge_size, patch_size, width, merge_size, patch_size, 3)
    rows = np.ascontiguousarray(cells.transpose(0, 3, 1, 4, 6, 2, 5))
    return rows.reshape(-1, 3 * patch_size * patch_size)
