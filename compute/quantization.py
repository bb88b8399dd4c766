"""Products with weights of eight bits.

A decode step reads all weights, and these have half the bytes of bfloat16.
"""

import sys

import torch
from torch import Tensor

from common.config import BadSetting
from compute.kernels.library import int8_kernels, panel_of
from compute.kernels.operations import PackedWeights
from compute.kernels.structures import OCTET
from compute.linear import packed_shape

GREATEST = 127


class Int8Linear:
    """A `Linear` on a CPU with int8 weights, and bfloat16 inputs and outputs.

    Each output has its own scale. Sums are float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        kernels = int8_kernels()
        assert kernels is not None, "check_quantization comes first"
        shape = (weight.shape[0], weight.shape[1])
        quantized, scales = quantize(weight)
        packed = quantized.new_empty(packed_shape(shape, panel_of(kernels), OCTET))
        kernels.pack_int8(quantized.data_ptr(), packed.data_ptr(), *shape)
        self.packed = PackedWeights(kernels, packed, shape, bias, scales)
        self.max_kernel_rows = sys.maxsize

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], plus `residual` if given."""
        return self.packed.multiply(x, residual)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights [num_outputs, num_inputs] and float32 scales [num_outputs].

    Their product approximates the weight.
    """
    wide = weight.float()
    scales = wide.abs().amax(1) / GREATEST
    divisors = scales.where(scales > 0, 1.0)
    return (wide / divisors[:, None]).round().to(torch.int8).contiguous(), scales


def check_quantization(quantization: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise BadSetting if this machine cannot compute with weights of this kind."""
    if quantization != "int8":
        return
    if device.type != "cpu" or dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise BadSetting(
            f"--quantization {quantization} is for --device cpu with --dtype bfloat16, not for "
            f"{name} on {device.type}"
        )
    if int8_kernels() is None:
        raise BadSetting(
            f"--quantization {quantization} needs a CPU with AVX2, and gcc or kernels that were "
            "compiled ahead"
        )
