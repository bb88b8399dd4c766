"""Products with weights of eight bits: half the bytes of bfloat16, of which a decode step reads
all."""

import sys

import torch
from torch import Tensor

from common.config import BadSetting
from compute.kernels.library import int8_kernels
from compute.kernels.operations import PackedWeights
from compute.linear import packed_shape

GREATEST = 127


class Int8Linear:
    """Like `Linear`, with bfloat16 inputs and outputs on a CPU; each output has a scale of its own,
    and sums are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        kernels = int8_kernels()
        assert kernels is not None and weight.dtype is torch.bfloat16, (
            "check_quantization comes first"
        )
        shape = (weight.shape[0], weight.shape[1])
        quantized, scales = quantize(weight)
        packed = quantized.new_empty(packed_shape(shape))
        kernels.pack_int8(quantized.data_ptr(), packed.data_ptr(), *shape)
        self.packed = PackedWeights(kernels, packed, shape, bias, scales)
        self.max_kernel_rows = sys.maxsize

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], with `residual` added where it is given."""
        return self.packed.multiply(x, residual)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [num_outputs, num_inputs] and float32 scales [num_outputs], whose product is near the
    weight."""
    wide = weight.float()
    scales = wide.abs().amax(1) / GREATEST
    divisors = scales.where(scales > 0, 1.0)
    return (wide / divisors[:, None]).round().to(torch.int8).contiguous(), scales


def check_quantization(quantization: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises BadSetting where weights of this kind cannot be computed with."""
    if quantization == "none":
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
