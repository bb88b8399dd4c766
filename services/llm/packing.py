"""Copies many small arrays to a device at once, without waiting for the copy."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Return all arrays one after the other, int64 [num_values].

    On CUDA it is pinned memory, which the device reads while the host goes on.
    """
    packed = torch.empty(
        sum(array.size for array in arrays), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    np.concatenate([array.ravel() for array in arrays], out=packed.numpy())
    return packed


def unpack(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return views of the single arrays in a packed tensor."""
    parts = packed.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return the arrays as int64 tensors on the device.

    torch keeps the pinned memory until the copy is done.
    """
    return unpack(
        pack(arrays, device).to(device, non_blocking=True), [array.shape for array in arrays]
    )


def upload_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Return one large tensor of any dtype on the device; the same tensor if it is there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
