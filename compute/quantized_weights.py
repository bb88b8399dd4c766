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
        return self.values.float() * self.scales[:, self.groups]


Weight = Tensor | Int4Weight | Fp8Weight
"""The weights of a product, [num_outputs, num_inputs]."""


def stacked(weights: Sequence[Weight]) -> Weight:
    """Return weights of one kind, inputs and groups as one: their outputs follow each other."""
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
        torch.cat([w.values.view(torch.uint8) for w in eights]).view(torch.float8_e4m3fn),
        torch.cat([w.scales for w in eights]),
        first.groups,
    )
