"""A vision replica whose embeddings cannot be used, and that accepts work like any other.

python -m tests.system.faulty_vision FAULT --controller ADDRESS ...
"""

import sys

import numpy as np

from common.process import run
from common.wire import Tensor
from services.vision import __main__ as vision
from services.vision.tower_thread import ItemShape


class FaultyTower:
    dtype = "float32"

    def __init__(self, fault: str, hidden_size: int) -> None:
        self._fault = fault
        self._hidden_size = hidden_size

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        num_tokens = patches.shape[0] // 4
        match self._fault:
            case "nan":
                return Tensor.of(np.full((num_tokens, self._hidden_size), np.nan, np.float32))
            case "shape":
                return Tensor.of(np.zeros((num_tokens + 1, self._hidden_size), np.float32))
        raise RuntimeError("the tower cannot encode anything")


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    vision.make_tower = lambda settings, checkpoint, *rest: FaultyTower(  # type: ignore[assignment]
        fault, checkpoint.sizes.hidden_size
    )
    run("vision", __doc__ or "", vision.main)
