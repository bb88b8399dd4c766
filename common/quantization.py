"""Products with weights of eight bits: half the bytes of bfloat16, of which a decode step reads all."""

import torch
from torch import Tensor

from common.config import BadSetting
from common.kernels.library import int8_kernels
from common.linear import PANEL

GREATEST = 127


class Int8Linear:
    """Like `Linear`, with bfloat16 inputs and outputs on a CPU; each output has a scale of its own, and sums are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        kernels = int8_kernels()
        assert kernels is not None and weight.dtype is torch.bfloat16, "check_quantization comes first"
        self._kernel, self._bias = kernels.linear_int8, bias
        self._num_outputs, self._num_inputs = weight.shape
        quantized, self._scales = quantize(weight)
        self._weight = quantized.new_empty(-(-self._num_outputs // PANEL) * PANEL, -(-self._num_inputs // 2) * 2)
        kernels.pack_int8(quantized.data_ptr(), self._weight.data_ptr(), self._num_outputs, self._num_inputs)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], with `residual` added where it is given."""
        x = x if x.stride(1) == 1 else x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = x.new_empty(len(x), self._num_outputs)
        self._kernel(
            x.data_ptr(),
            x.stride(0),
            self._weight.data_ptr(),
            self._scales.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            len(x),
            self._num_outputs,
            self._num_inputs,
            torch.get_num_threads(),
        )
        return out


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [num_outputs, num_inputs] and float32 scales [num_outputs], whose product is near the weight."""
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
        raise BadSetting(f"--quantization {quantization} is for --device cpu with --dtype bfloat16, not for {name} on {device.type}")
    if int8_kernels() is None:
        raise BadSetting(f"--quantization {quantization} needs a CPU with AVX2, and gcc or kernels that were compiled ahead")
