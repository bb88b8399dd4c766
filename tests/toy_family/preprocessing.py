"""The preprocess rules of the toy family: pictures keep their size, and are padded with white."""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from common.checkpoint import Checkpoint
from common.errors import TooLarge
from common.item_hash import item_hash
from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.preprocess.families import ItemLimits
from services.preprocess.families.limits import check_bounds
from services.preprocess.prepared import PreparedItem

MAX_SIDE = 96
"""Longer sides are shortened to this number of pixels."""
PADDING = 255
TOKENS_PER_PARAMETER = 64
"""The rope parameter of a prompt grows by 1 for each such number of tokens."""


@dataclass(frozen=True)
class Picture:
    """A padded picture. Implements `PreparedItem`."""

    kind: ItemKind
    mm_hash: str
    pixels: np.ndarray
    """uint8 [height, width, 3], padded to whole patches and whole tokens."""
    content_size: tuple[int, int]
    patch: int
    patches_per_token: int
    step_seconds: float = 0.0

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        height, width, _ = self.pixels.shape
        return 1, height // self.patch, width // self.patch

    @property
    def num_patches(self) -> int:
        return prod(self.grid_thw)

    @property
    def num_tokens(self) -> int:
        return self.num_patches // self.patches_per_token

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def patches(self) -> np.ndarray:
        """Patches in raster order, values by (channel, y, x)."""
        _, rows, columns = self.grid_thw
        cells = self.pixels.reshape(rows, self.patch, columns, self.patch, 3)
        return cells.transpose(0, 2, 4, 1, 3).reshape(self.num_patches, -1)


class ToyRules:
    """Implements `FamilyRules`."""

    whole = False
    chat_prompt = None
    fit_prompt = None

    def __init__(self, checkpoint: Checkpoint, limits: ItemLimits) -> None:
        eye = checkpoint.config["eye"]
        self._patch: int = eye["patch"]
        self._patches_per_token: int = eye["patches_per_token"]
        self._fingerprint = checkpoint.fingerprint

    def fitting_size(
        self, height: int, width: int, max_patches: int, bounds: PixelBounds = NO_BOUNDS
    ) -> tuple[int, int]:
        size = min(height, MAX_SIDE), min(width, MAX_SIDE)
        check_bounds(bounds, *size)
        rows, columns = self._grid(*size)
        if max_patches and rows * columns > max_patches:
            raise TooLarge(f"it has {rows * columns} patches, at most {max_patches} are allowed")
        return size

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches. Each row has whole tokens."""
        tokens = -(-width // (self._patch * self._patches_per_token))
        return -(-height // self._patch), tokens * self._patches_per_token

    def num_tokens(self, height: int, width: int) -> int:
        return prod(self._grid(height, width)) // self._patches_per_token

    def prepare_item(self, kind: ItemKind, pixels: np.ndarray) -> Picture:
        height, width, _ = pixels.shape
        size = (height, width)
        rows, columns = self._grid(height, width)
        shape = (rows * self._patch, columns * self._patch, 3)
        padded = np.full(shape, PADDING, dtype=np.uint8)
        padded[:height, :width] = pixels
        picture = Picture(kind, "", padded, size, self._patch, self._patches_per_token)
        cut = np.ascontiguousarray(picture.patches()).data
        mm_hash = item_hash(self._fingerprint, kind, picture.grid_thw, size, cut)
        return replace(picture, mm_hash=mm_hash)

    def positions(
        self, num_tokens: int, offsets: list[int], items: list[PreparedItem]
    ) -> tuple[np.ndarray, int]:
        """The first component stands still in an item; the second counts its tokens.

        The text after an item of n tokens goes on n // 2 + 1 beyond the item's first position.
        """
        positions = np.empty((2, num_tokens), dtype=np.int64)
        done = counter = 0
        for offset, item in zip(offsets, items, strict=True):
            positions[:, done:offset] = np.arange(counter, counter + offset - done)
            counter += offset - done
            done = offset + item.num_tokens
            positions[0, offset:done] = counter
            positions[1, offset:done] = np.arange(counter, counter + item.num_tokens)
            counter += item.num_tokens // 2 + 1
        positions[:, done:] = np.arange(counter, counter + num_tokens - done)
        return positions, counter - done

    def rope_parameter(self, num_tokens: int) -> int:
        return 1 + num_tokens // TOKENS_PER_PARAMETER


load = ToyRules
