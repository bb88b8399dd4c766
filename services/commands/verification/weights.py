"""The weights of a checkpoint in float32, read when they are needed and dropped afterwards."""

import math

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ACTIVATION_BYTES = 1 << 30
"""What the longest built-in question needs besides the weights, with room to spare."""


class Float32Weights:
    """Tensors by their canonical names. Each read makes a new one, so no model is ever whole in
    memory, and one larger than the host's memory can be verified there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        canonical_name = checkpoint.family.canonical_name
        self._tensors = {canonical_name(name): info for name, info in checkpoint.tensors.items()}
        self._path = checkpoint.path

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor in float32. Raises BadCheckpoint if there is none, or it is quantised."""
        info = self._tensors.get(name)
        if info is None:
            raise BadCheckpoint(f"{self._path} has no tensor {name}")
        if info.dtype not in DTYPES:
            raise BadCheckpoint(f"{info.file}: {name} is {info.dtype}: quantised weights")
        stored = np.memmap(info.file, np.uint8, "c", info.offset, (info.num_bytes,))
        tensor = torch.from_numpy(stored).view(DTYPES[info.dtype]).reshape(info.shape)
        return tensor.to(torch.float32, copy=True)

    def find(self, name: str) -> Tensor | None:
        """Return a tensor in float32, or None if there is none of this name."""
        if name not in self:
            return None
        return self[name]

    @property
    def bytes_needed(self) -> int:
        """The memory in bytes for the largest tensor, as read and as used, and for activations."""
        largest = max(math.prod(info.shape) for info in self._tensors.values())
        return 2 * 4 * largest + ACTIVATION_BYTES
