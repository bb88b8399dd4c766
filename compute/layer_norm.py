"""Layer norms with their weights."""

from dataclasses import dataclass

from torch import Tensor

from compute.kernels.operations import layer_norm


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """x [n, width] -> [n, width]: each row with mean 0 and variance 1, times weight, plus bias."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)
