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
from compute.quantized_weights import Fp8Weight

GREATEST = 127
SAMPLED_INPUTS = 256
"""The inputs by which the scale of an output is chosen."""


class Int8Linear:
    """A `Linear` on a CPU with int8 weights, and bfloat16 inputs and outputs.

    Each output has its own scale. Sums are float32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None
    ) -> None:
        """Round a weight. `scales` are those of its outputs, as in `quantize`."""
        kernels = int8_kernels()
        assert kernels is not None, "check_quantization comes first"
        shape = (weight.shape[0], weight.shape[1])
        quantized, scales = quantize(weight, scales)
        packed = quantized.new_empty(packed_shape(shape, panel_of(kernels), OCTET))
        kernels.pack_int8(quantized.data_ptr(), packed.data_ptr(), *shape)
        self.packed = PackedWeights(kernels, packed, shape, bias, scales)
        self.max_kernel_rows = sys.maxsize

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], plus `residual` if given."""
        return self.packed.multiply(x, residual)


def quantize(weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 weights [num_outputs, num_inputs] and float32 scales [num_outputs].

    Their product approximates the weight. By default, the scales are the least that reach it.
    """
    wide = weight.float()
    if scales is None:
        scales = wide.abs().amax(1) / GREATEST
    divisors = scales.where(scales > 0, 1.0)
    return (wide / divisors[:, None]).round_().to(torch.int8).contiguous(), scales


def scales_of_fp8(weight: Fp8Weight, wide: Tensor) -> Tensor:
    """Return scales with which int8 comes nearest to a weight of FP8, float32 [num_outputs].

    `wide` is the weight dequantized. The steps of FP8 are powers of two times its scale. If those
    of int8 are, too, most values are exact. This holds in the groups that have the scale of the
    greatest value; if others have other scales, the least scale that reaches it may be better.
    Some of the inputs decide.
    """
    greatest, where = wide.abs().max(1)
    least = greatest / GREATEST
    stored = weight.scales.gather(1, weight.groups[where][:, None])[:, 0]
    ratios = (least / stored).where(least > 0, 1.0)
    aligned = stored * torch.exp2(torch.log2(ratios).ceil())
    sample = wide[:, :: -(-wide.shape[1] // SAMPLED_INPUTS)]
    is_nearer = rounding_error(sample, aligned) < rounding_error(sample, least)
    return torch.where(is_nearer, aligned, least)


def rounding_error(wide: Tensor, scales: Tensor) -> Tensor:
    """Return the squared distance of each output from its int8 form, [num_outputs]."""
    values, scales = quantize(wide, scales)
    return (values * scales[:, None] - wide).square_().sum(1)


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
