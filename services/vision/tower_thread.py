"""The vision tower in a thread of its own, so that the replica answers offers while it encodes."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.messages import ItemKey, ItemKind
from common.progress import Progress, UnitTimes
from common.wire import Tensor

ATTENDED_PATCHES = 8192
"""Attention to this many patches takes about as long as everything else for one patch."""


class DeviceLost(Exception):
    """This process has lost the device: it must end and be started again."""


@dataclass(frozen=True, slots=True)
class ItemShape:
    """What a tower must know of an item besides its patches."""

    grid_thw: tuple[int, int, int]
    """The grid of patches: steps in time, rows, columns."""
    content_size: tuple[int, int]
    """Height and width of the content in pixels. What the grid has beyond it is padding."""
    kind: ItemKind = "image"
    frames_per_patch: int = 1
    """How many times the values of one frame a patch has."""


class Tower(Protocol):
    """Encodes one item at a time."""

    dtype: str
    """The dtype of the embeddings. Embeddings of two dtypes must not be mixed up in a cache."""

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        """uint8 [num_patches, values per patch] -> [num_item_tokens, width of the embeddings]."""
        ...


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """The embeddings of an item, or the error that the tower raised."""

    key: ItemKey
    began: float
    seconds: float
    embeddings: Tensor | None = None
    error: Exception | None = None


class TowerThread:
    """Encodes one item at a time and reports each result from its own thread."""

    def __init__(
        self, tower: Tower, report: Callable[[EncodeResult], None], progress: Progress
    ) -> None:
        """Only this thread stamps `progress`."""
        self._tower = tower
        self._report = report
        self._progress = progress
        self._times = UnitTimes()
        self._work: queue.SimpleQueue[tuple[ItemKey, Tensor, ItemShape]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="tower", daemon=True).start()

    def begin(self, key: ItemKey, patches: Tensor, shape: ItemShape) -> None:
        """Encode this item after those that were given before."""
        self._work.put((key, patches, shape))

    def _run(self) -> None:
        while True:
            self._progress.idle()
            key, patches, shape = self._work.get()
            with self._progress.unit(self._times, size_of(patches)):
                result = encode(self._tower, key, patches, shape)
            self._report(result)


def size_of(patches: Tensor) -> int:
    """Return the size of an item as a unit of work, in patches."""
    num_patches = patches.shape[0]
    return num_patches + num_patches**2 // ATTENDED_PATCHES


def encode(tower: Tower, key: ItemKey, patches: Tensor, shape: ItemShape) -> EncodeResult:
    began = time.monotonic()
    try:
        embeddings = tower.encode(patches, shape)
    except Exception as e:  # noqa: BLE001 - this thread's outermost loop: other items go on
        return EncodeResult(key, began, time.monotonic() - began, error=e)
    return EncodeResult(key, began, time.monotonic() - began, embeddings)
