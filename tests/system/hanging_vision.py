"""A vision replica that encodes one image and hangs in the second, while its connections live.

python -m tests.system.hanging_vision --controller ADDRESS ...
"""

import threading
from typing import Any

from common.process import run
from common.wire import Tensor
from services.vision import __main__ as vision
from services.vision.tower_thread import ItemShape


class HangingTower:
    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self._num_encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        self._num_encoded += 1
        if self._num_encoded > 1:
            threading.Event().wait()
        embeddings: Tensor = self._tower.encode(patches, shape)
        return embeddings


if __name__ == "__main__":
    make_tower = vision.make_tower
    vision.make_tower = lambda *arguments: HangingTower(make_tower(*arguments))  # type: ignore[assignment]
    run("vision", __doc__ or "", vision.main)
