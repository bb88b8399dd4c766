"""The weights that a quantized checkpoint means, in float32, from the descriptions of its format.

It shares the names of the tensors with the services, and no arithmetic.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.quantized_weights import QuantizedWeight
from common.tensor_info import TensorInfo

AWQ_ENTRIES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs that an int32 of AWQ holds, from its lowest bits to its highest."""
ReadTensor = Callable[[TensorInfo], Tensor]
"""Returns a tensor as it is stored."""


def dequantized(weight: QuantizedWeight, read: ReadTensor, num_inputs: int) -> Tensor:
    """Return float32 [num_outputs, num_inputs]."""
    scheme = weight.scheme
    values = values_of(weight, read(weight.values))[:, :num_inputs]
    scales = read(weight.scales).float()
    if scheme.layout in ("awq", "gptq"):
        scales = scales.T
    scales = scales.reshape(-1, weight.num_groups)
    group_size = scheme.columns or weight.shape[1]
    groups = torch.arange(num_inputs).div(group_size, rounding_mode="floor")
    if weight.groups is not None:
        groups = read(weight.groups).long()
    if scheme.layout == "fp8":
        height = scheme.rows or weight.shape[0]
        scales = scales.repeat_interleave(height, 0)[: weight.shape[0]]
        return values * scales[:, groups]
    zeros = zeros_of(weight, read)[: weight.shape[0], groups]
    return (values - zeros) * scales[:, groups]


def values_of(weight: QuantizedWeight, stored: Tensor) -> Tensor:
    """Return the values as numbers, float32 [num_outputs, num_inputs]."""
    match weight.scheme.layout:
        case "awq":
            return unpacked(stored, AWQ_ENTRIES).T.float()
        case "gptq":
            return unpacked(stored.T).float()
        case "packed":
            return unpacked(stored).float()
        case "fp8":
            return stored.float()


def zeros_of(weight: QuantizedWeight, read: ReadTensor) -> Tensor:
    """Return the zero points, float32 [num_outputs or more, num_groups]."""
    if weight.zeros is None:
        return torch.full((weight.shape[0], weight.num_groups), 8.0)
    stored = read(weight.zeros)
    match weight.scheme.layout:
        case "awq":
            return unpacked(stored, AWQ_ENTRIES).T.float()
        case "packed":
            return unpacked(stored.T).T.float()
    return unpacked(stored.long() + weight.scheme.zero_offset).T.float()


def unpacked(stored: Tensor, entries: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Return the values of int32 [n, m], int64 [n, 8 * m]."""
    values = torch.empty(*stored.shape, 8, dtype=torch.int64)
    for place, entry in enumerate(entries):
        values[..., entry] = (stored.long() >> (4 * place)) & 15
    return values.flatten(1)
