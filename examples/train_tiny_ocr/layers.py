"""The layers that the vision tower and the language model share."""

import torch
from kernels import activation_dtype, gated, rms
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms(x, self.weight, activation_dtype())


def linear(inputs: int, outputs: int, bias: bool, zero: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=0.0 if zero else inputs**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    def __init__(self, size: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = linear(size, inner, bias)
        self.up_proj = linear(size, inner, bias)
        self.down_proj = linear(inner, size, bias, zero=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
