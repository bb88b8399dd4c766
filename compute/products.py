"""Chooses how a product with the weights of a checkpoint is computed."""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from common.logs import get_logger
from compute import triton_kernels
from compute.int4_linear import Int4Linear
from compute.kernels.library import PORTABLE, int8_kernels
from compute.kernels.operations import PackedWeights
from compute.linear import Linear
from compute.quantization import Int8Linear, scales_of_fp8
from compute.quantized_weights import (
    Fp8Weight,
    Int4Weight,
    QuantizedTensor,
    Weight,
    can_stack,
    stacked,
)


class Product(Protocol):
    """x [n, num_inputs] -> x @ weight.T + bias [n, num_outputs], plus `residual` if given."""

    @property
    def packed(self) -> PackedWeights | None: ...

    @property
    def max_kernel_rows(self) -> int: ...

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class SideBySideProducts:
    """Products of one input, whose outputs stand side by side.

    They are not one product because one is quantized and another is not, or because their inputs
    have different groups.
    """

    packed: PackedWeights | None = None
    max_kernel_rows = -1

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = tuple(products)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], plus `residual` if given."""
        y = torch.cat([product(x) for product in self._products], -1)
        return y if residual is None else y.add_(residual)


def product_of_parts(
    weights: Sequence[Weight],
    bias: Tensor | None,
    dtype: torch.dtype,
    quantization: str = "auto",
) -> Product:
    """Return the product with weights whose outputs follow each other, as `product_of` does."""
    if len(weights) == 1:
        return product_of(weights[0], bias, dtype, quantization)
    if can_stack(weights):
        return product_of(stacked(weights), bias, dtype, quantization)
    lengths = [weight.shape[0] for weight in weights]
    biases = [None] * len(weights) if bias is None else bias.split(lengths)
    return SideBySideProducts(
        [
            product_of(weight, part, dtype, quantization)
            for weight, part in zip(weights, biases, strict=True)
        ]
    )


def product_of(
    weight: Weight, bias: Tensor | None, dtype: torch.dtype, quantization: str = "auto"
) -> Product:
    """Return the product with a weight, for inputs and outputs of a dtype.

    With `quantization` "int8", weights that are not quantized are rounded to eight bits. Quantized
    weights that no kernel here multiplies are dequantized.
    """
    if isinstance(weight, Tensor):
        return Int8Linear(weight, bias) if quantization == "int8" else Linear(weight, bias)
    device = weight.values.device
    product: Product | None = None
    if triton_kernels.serve(device):
        product = card_product(weight, bias, dtype)
    elif device.type == "cpu" and not PORTABLE.get():
        product = cpu_product(weight, bias, dtype)
    if product is None:
        bits = 4 if isinstance(weight, Int4Weight) else 8
        warn_of_dequantized(bits, dtype, device.type)
        product = Linear(weight.dequantized().to(dtype), bias)
    return product


def cpu_product(weight: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> Product | None:
    """Return a product with quantized weights in the memory of the host; None without a kernel."""
    if dtype is not torch.bfloat16 or int8_kernels() is None:
        return None
    if isinstance(weight, Fp8Weight):
        wide = weight.dequantized()
        return Int8Linear(wide, bias, scales_of_fp8(weight, wide))
    return Int4Linear(weight, bias)


def card_product(weight: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """Return a product with quantized weights where Triton's kernels compute."""
    # Imported only here, because they import Triton.
    from compute.triton_kernels.fp8 import CardFp8Linear
    from compute.triton_kernels.int4 import CardInt4Linear

    device = weight.values.device
    if isinstance(weight, Int4Weight):
        return CardInt4Linear(weight, bias, dtype, device)
    return CardFp8Linear(weight, bias, dtype, device)


@cache
def warn_of_dequantized(bits: int, dtype: torch.dtype, device: str) -> None:
    """Log, once, that weights of so few bits take more memory than in their checkpoint."""
    times = 8 * dtype.itemsize // bits
    get_logger().warning(
        "the quantized weights are dequantized, because no kernel here multiplies them",
        bits=bits,
        dtype=str(dtype),
        device=device,
        memory=f"{times} times that of the checkpoint",
    )
