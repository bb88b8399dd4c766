"""The vision tower in a thread of its own, so that the replica answers offers at once while an
image is in the tower."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.progress import Progress, UnitTimes
from common.wire import Tensor

Key = tuple[str, int, int]
"""(request_id, attempt, image)."""


class DeviceLost(Exception):
    """The device is lost to this process: it must end, and be started anew."""


class Tower(Protocol):
    dtype: str
    """Of the embeddings: those of one dtype do not stand for those of another."""

    def encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
        """uint8 [num_patches, channels * patch_size ** 2] to [num_image_tokens, hidden_size]."""
        ...


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """The tower is through with an image."""

    key: Key
    began: float
    seconds: float
    embeddings: Tensor | None = None
    error: Exception | None = None


class TowerThread:
    """Encodes one image at a time, and reports each from its thread."""

    def __init__(
        self, tower: Tower, report: Callable[[EncodeResult], None], progress: Progress
    ) -> None:
        """`progress` is stamped by this thread alone."""
        self._tower = tower
        self._report = report
        self._progress = progress
        self._times = UnitTimes()
        self._work: queue.SimpleQueue[tuple[Key, Tensor, tuple[int, int, int]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, name="tower", daemon=True).start()

    def begin(self, key: Key, patches: Tensor, grid_thw: tuple[int, int, int]) -> None:
        self._work.put((key, patches, grid_thw))

    def _run(self) -> None:
        while True:
            self._progress.idle()
            key, patches, grid_thw = self._work.get()
            with self._progress.unit(self._times, patches.shape[0]):
                encoded = encode(self._tower, key, patches, grid_thw)
            self._report(encoded)


def encode(tower: Tower, key: Key, patches: Tensor, grid_thw: tuple[int, int, int]) -> EncodeResult:
    began = time.monotonic()
    try:
        embeddings = tower.encode(patches, grid_thw)
    except Exception as e:  # noqa: BLE001 - the outermost loop of this thread: one image that cannot be encoded ends nothing else
        return EncodeResult(key, began, time.monotonic() - began, error=e)
    return EncodeResult(key, began, time.monotonic() - began, embeddings)
