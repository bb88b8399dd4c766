"""The weights of a checkpoint in float32, read when they are needed and dropped afterwards."""

import math

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import BadCheckpoint, Checkpoint
from common.tensor_info import TensorInfo
from services.commands.verification.dequantized import dequantized

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32, "I64": torch.int64}
ACTIVATION_BYTES = 1 << 30
"""What the longest built-in question needs besides the weights, with room to spare."""


class Float32Weights:
    """Tensors by their canonical names. Each read makes a new one, so no model is ever whole in
    memory, and one larger than the host's memory can be verified there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        canonical_name = checkpoint.family.canonical_name
        self._tensors = {canonical_name(name): info for name, info in checkpoint.tensors.items()}
        self._quantized = checkpoint.quantized
        self._shapes = checkpoint.shapes
        self._path = checkpoint.path

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._quantized

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor in float32. Raises BadCheckpoint if there is none, or of another type."""
        if name in self._quantized:
            return self._dequantized(name)
        info = self._tensors.get(name)
        if info is None:
            raise BadCheckpoint(f"{self._path} has no tensor {name}")
        if info.dtype not in DTYPES:
            raise BadCheckpoint(f"{info.file}: {name} is {info.dtype}, which is not supported")
        return stored(info).to(torch.float32, copy=True)

    def _dequantized(self, name: str) -> Tensor:
        weight = self._quantized[name]
        num_inputs = weight.shape[1]
        # Packed weights may fill their last integer in part.
        if shape := self._tensors.get(f"{name}_shape"):
            num_inputs = int(stored(shape)[-1])
        return dequantized(weight, stored, num_inputs)

    def find(self, name: str) -> Tensor | None:
        """Return a tensor in float32, or None if there is none of this name."""
        if name not in self:
            return None
        return self[name]

    @property
    def bytes_needed(self) -> int:
        """The memory in bytes for the largest tensor, as read and as used, and for activations."""
        return 2 * 4 * max(map(math.prod, self._shapes.values())) + ACTIVATION_BYTES


def stored(info: TensorInfo) -> Tensor:
    """Return a tensor in the type that it has in its file."""
    content = np.memmap(info.file, np.uint8, "c", info.offset, (info.num_bytes,))
    return torch.from_numpy(content).view((DTYPES | QUANTIZED)[info.dtype]).reshape(info.shape)
