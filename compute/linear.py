"""Matrix products with weights that are laid out once, when they are loaded."""

import ctypes
import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels.library import PORTABLE, bfloat16_kernels, cpu_flags, panel_of
from compute.kernels.operations import PackedWeights
from compute.kernels.structures import MAX_LINEAR_ROWS

MAX_KERNEL_ROWS = MAX_LINEAR_ROWS
"""Up to this number of rows our kernel is faster than oneDNN's on the same packed weights."""
MAX_KERNEL_ROWS_WITH_AMX = 16
"""The same number on a CPU with AMX, whose tiles oneDNN uses."""
MAX_FLOAT16_ROWS = 8
"""With more rows float16 weights are widened for a product, because torch emulates float16."""


class Linear:
    """x [n, num_inputs] -> x @ weight.T + bias [n, num_outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        """(num_outputs, num_inputs)."""
        self.packed: PackedWeights | None = None
        self.max_kernel_rows = -1
        self._widens = emulates(weight)
        self.is_packed_by_onednn = weight.device.type == "cpu" and can_pack(weight.dtype)
        if self.is_packed_by_onednn:
            self._pack_by_onednn()
        elif kernels := packing_kernels(weight):
            self._pack_by_kernel(kernels)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], plus `residual` if given."""
        if self.packed and len(x) <= self.max_kernel_rows:
            return self.packed.multiply(x, residual)
        if self.is_packed_by_onednn:
            product = self.by_onednn(x)
        elif self._widens and len(x) > MAX_FLOAT16_ROWS:
            product = self._in_float32(x)
        else:
            product = F.linear(x, self._weight, self._bias)
        return product if residual is None else product.add_(residual)

    def by_onednn(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def _in_float32(self, x: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias.float()
        return F.linear(x.float(), self._weight.float(), bias).to(x.dtype)

    def _pack_by_onednn(self) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)
        is_readable = self._weight.dtype is torch.bfloat16 and self.shape[1] % 2 == 0
        if is_readable and (kernels := kernels_for_packed()):
            self._use(kernels, max_kernel_rows())

    def _pack_by_kernel(self, kernels: ctypes.CDLL) -> None:
        packed = self._weight.new_empty(packed_shape(self.shape, panel_of(kernels), 2))
        kernels.pack_weights(self._weight.contiguous().data_ptr(), packed.data_ptr(), *self.shape)
        self._weight = packed
        self._use(kernels, sys.maxsize)

    def _use(self, kernels: ctypes.CDLL, max_rows: int) -> None:
        self.packed = PackedWeights(kernels, self._weight, self.shape, self._bias)
        self.max_kernel_rows = max_rows


def packed_shape(shape: tuple[int, int], panel: int, inputs: int) -> tuple[int, int]:
    """Return the shape of weights that our kernels pack: whole panels and whole bundles of inputs.

    A panel has that many outputs, a bundle that many inputs.
    """
    num_outputs, num_inputs = shape
    return -(-num_outputs // panel) * panel, -(-num_inputs // inputs) * inputs


def max_kernel_rows() -> int:
    """Return the most rows for which our kernel multiplies weights that oneDNN packed."""
    return MAX_KERNEL_ROWS_WITH_AMX if "amx_bf16" in cpu_flags() else MAX_KERNEL_ROWS


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype."""
    if PORTABLE.get() or not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (
        dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def emulates(weight: Tensor) -> bool:
    """Whether torch emulates products of this weight: float16 on most CPUs."""
    is_ours = weight.device.type == "cpu" and weight.dtype is torch.float16
    return is_ours and not PORTABLE.get() and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def packing_kernels(weight: Tensor) -> ctypes.CDLL | None:
    """Return the kernels that pack weights themselves, because oneDNN packs no bfloat16 here.

    They multiply any number of rows.
    """
    is_ours = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
    kernels = bfloat16_kernels() if is_ours and not PORTABLE.get() else None
    return kernels if hasattr(kernels, "pack_weights") else None


@cache
def kernels_for_packed() -> ctypes.CDLL | None:
    """Return our kernels if they can read weights that oneDNN packed; else None.

    oneDNN does not promise a layout, so a small product is compared.
    """
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
    expected = F.linear(x.float(), weight.float())
    return kernels if torch.allclose(found.float(), expected, rtol=0.02, atol=0.02) else None
