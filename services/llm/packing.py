"""Many small arrays to a device in one copy, for which nobody waits."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """int64, one array after the other, in memory from which the device can read while the host
    goes on."""
    packed = torch.empty(
        sum(array.size for array in arrays), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    np.concatenate([array.ravel() for array in arrays], out=packed.numpy())
    return packed


def unpack(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of the single arrays."""
    parts = packed.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as int64 tensors on the device. torch keeps the pinned memory until the copy is
    done."""
    return unpack(
        pack(arrays, device).to(device, non_blocking=True), [array.shape for array in arrays]
    )


def upload_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """The same for one that is large, of any dtype; as it is where it is there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
