"""The matrix product with weights that are laid out once, when they are loaded."""

import ctypes
import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels.library import bfloat16_kernels, cpu_flags
from compute.kernels.operations import PackedWeights

# Up to so many rows our kernel is faster than oneDNN's on the same packed weights; one that has
# tiles overtakes earlier.
MAX_KERNEL_ROWS = 64
MAX_KERNEL_ROWS_BESIDE_AMX = 16
# Outputs of which the kernels that pack the weights themselves make one panel.
PANEL = 16


class Linear:
    """x [n, num_inputs] -> x @ weight.T + bias [n, num_outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.packed: PackedWeights | None = None
        self.max_kernel_rows = -1
        self.is_packed_by_onednn = weight.device.type == "cpu" and can_pack(weight.dtype)
        if self.is_packed_by_onednn:
            self._pack_by_onednn()
        elif kernels := packing_kernels(weight):
            self._pack_by_kernel(kernels)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With `residual` added where it is given."""
        if self.packed and len(x) <= self.max_kernel_rows:
            return self.packed.multiply(x, residual)
        product = (
            self.by_onednn(x) if self.is_packed_by_onednn else F.linear(x, self._weight, self._bias)
        )
        return product if residual is None else product.add_(residual)

    def by_onednn(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def _pack_by_onednn(self) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)
        kernels = (
            kernels_for_packed()
            if self._weight.dtype is torch.bfloat16 and self._shape[1] % 2 == 0
            else None
        )
        if kernels is not None:
            self._use(kernels, max_kernel_rows())

    def _pack_by_kernel(self, kernels: ctypes.CDLL) -> None:
        packed = self._weight.new_empty(packed_shape(self._shape))
        kernels.pack_weights(self._weight.contiguous().data_ptr(), packed.data_ptr(), *self._shape)
        self._weight = packed
        self._use(kernels, sys.maxsize)

    def _use(self, kernels: ctypes.CDLL, max_rows: int) -> None:
        self.packed = PackedWeights(kernels, self._weight, self._shape, self._bias)
        self.max_kernel_rows = max_rows


def packed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Of weights that a kernel packs: whole panels and pairs of inputs."""
    num_outputs, num_inputs = shape
    return -(-num_outputs // PANEL) * PANEL, -(-num_inputs // 2) * 2


def max_kernel_rows() -> int:
    """Of weights that oneDNN packed."""
    return MAX_KERNEL_ROWS_BESIDE_AMX if "amx_bf16" in cpu_flags() else MAX_KERNEL_ROWS


def can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (
        dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def packing_kernels(weight: Tensor) -> ctypes.CDLL | None:
    """Those that compute any number of rows, where oneDNN has no bfloat16."""
    kernels = (
        bfloat16_kernels()
        if weight.device.type == "cpu" and weight.dtype is torch.bfloat16
        else None
    )
    return kernels if hasattr(kernels, "pack_weights") else None


@cache
def kernels_for_packed() -> ctypes.CDLL | None:
    """Our kernels, where oneDNN packs weights the way that they read them: nobody promises that it
    always will."""
    kernels = bfloat16_kernels()
    if kernels is None:
        return None
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(136, 72, generator=random).bfloat16()
    x = torch.randn(3, 72, generator=random).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    if torch.ops.mkldnn._nbytes(packed) != 192 * 96 * 2:
        return None
    found = PackedWeights(kernels, packed, (136, 72)).multiply(x, None)
    return (
        kernels
        if torch.allclose(found.float(), F.linear(x.float(), weight.float()), rtol=0.02, atol=0.02)
        else None
    )
