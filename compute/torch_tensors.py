"""Conversion between torch tensors and wire tensors."""

import torch

from common.wire import Tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_wire(tensor: torch.Tensor) -> Tensor:
    """Return the tensor for the wire: a view if it is contiguous and on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    return Tensor(
        NAMES[tensor.dtype], tuple(tensor.shape), tensor.flatten().view(torch.uint8).numpy().data
    )


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Return a copy. Frames are read-only, and torch does not know read-only memory."""
    return torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).reshape(
        tensor.shape
    )
