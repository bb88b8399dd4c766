"""torch tensors to wire tensors and back."""

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
    """A view of the tensor where it is contiguous and on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    return Tensor(
        NAMES[tensor.dtype], tuple(tensor.shape), tensor.flatten().view(torch.uint8).numpy().data
    )


def to_torch(tensor: Tensor) -> torch.Tensor:
    """A copy: frames are read-only, which torch has no notion of."""
    return torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).reshape(
        tensor.shape
    )
