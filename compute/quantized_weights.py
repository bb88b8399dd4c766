"""Weights of a quantized checkpoint, in one form for every format."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """Weights of four bits: (value - zero) * scale, where each group of inputs has its own pair."""

    values: Tensor
    """uint8 [num_outputs, num_inputs], 0 to 15."""
    scales: Tensor
    """float32 [num_outputs, num_groups]."""
    zeros: Tensor
    """uint8 [num_outputs, num_groups], 0 to 16: the value that means zero."""
    groups: Tensor
    """int64 [num_inputs]: the group of each input. A rank's part may begin within a group, and
    checkpoints that sort their inputs by activation have them in any order."""

    @property
    def shape(self) -> tuple[int, int]:
        """(num_outputs, num_inputs)."""
        return self.values.shape[0], self.values.shape[1]

    def dequantized(self) -> Tensor:
        """Return the weights that these mean, float32 [num_outputs, num_inputs]."""
        offsets = self.values.float() - self.zeros.float()[:, self.groups]
        return offsets * self.scales[:, self.groups]


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """Weights of eight bits in floating point: value * scale."""

    values: Tensor
    """float8_e4m3fn [num_outputs, num_inputs]."""
    scales: Tensor
    """float32 [num_outputs, num_groups]; one group if the scale is that of the output alone."""
    groups: Tensor
    """int64 [num_inputs]: the group of each input."""

    @property
    def shape(self) -> tuple[int, int]:
        """(num_outputs, num_inputs)."""
        return self.values.shape[0], self.values.shape[1]

    def dequantized(self) -> Tensor:
        """Return the weights that these mean, float32 [num_outputs, num_inputs]."""
        scales = self.scales if self.scales.shape[1] == 1 else self.scales[:, self.groups]
        return self.values.float() * scales


QuantizedTensor = Int4Weight | Fp8Weight
"""Weights that are kept as a checkpoint stores them."""
Weight = Tensor | QuantizedTensor
"""The weights of a product, [num_outputs, num_inputs]."""


def with_zeros(weight: Weight, dim: int, num_zeros: int) -> Weight:
    """Return weights with the zeros that follow them along a dimension."""
    if isinstance(weight, Tensor):
        return padded(weight, dim, num_zeros)
    if not num_zeros:
        return weight
    # Zeros get a group whose scale is zero: no value of four bits need mean zero in another one.
    groups = weight.groups
    scales = padded(weight.scales, dim, num_zeros if dim == 0 else 1)
    if dim == 1:
        groups = torch.cat((groups, groups.new_full((num_zeros,), scales.shape[1] - 1)))
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(padded(weight.values, dim, num_zeros), scales, groups)
    zeros = padded(weight.zeros, dim, num_zeros if dim == 0 else 1)
    return Int4Weight(padded(weight.values, dim, num_zeros), scales, zeros, groups)


def padded(tensor: Tensor, dim: int, num_zeros: int) -> Tensor:
    """Return a tensor with the zeros that follow its entries along a dimension."""
    if not num_zeros:
        return tensor
    zeros = list(tensor.shape)
    zeros[dim] = num_zeros
    return joined((tensor, torch.zeros(zeros, device=tensor.device).to(tensor.dtype)), dim)


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return `torch.cat` of the tensors, which may be of eight bits in floating point."""
    dtype = tensors[0].dtype
    if dtype is not torch.float8_e4m3fn:
        return torch.cat(list(tensors), dim)
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors], dim).view(dtype)


def can_stack(weights: Sequence[Weight]) -> bool:
    """Whether `stacked` may join weights: they are of one kind, and share the groups of inputs."""
    first = weights[0]
    if isinstance(first, Tensor):
        return all(isinstance(weight, Tensor) for weight in weights)
    return all(
        isinstance(weight, type(first)) and weight.groups.equal(first.groups) for weight in weights
    )


def stacked(weights: Sequence[Weight]) -> Weight:
    """Return weights that `can_stack` as one: their outputs follow each other."""
    first = weights[0]
    if isinstance(first, Tensor):
        return torch.cat([w for w in weights if isinstance(w, Tensor)])
    if isinstance(first, Int4Weight):
        fours = [w for w in weights if isinstance(w, Int4Weight)]
        return Int4Weight(
            torch.cat([w.values for w in fours]),
            torch.cat([w.scales for w in fours]),
            torch.cat([w.zeros for w in fours]),
            first.groups,
        )
    eights = [w for w in weights if isinstance(w, Fp8Weight)]
    return Fp8Weight(
        joined([w.values for w in eights]),
        torch.cat([w.scales for w in eights]),
        first.groups,
    )
