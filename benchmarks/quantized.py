"""Write weights in the formats of quantized checkpoints: AWQ, GPTQ and compressed-tensors.

The weights are only rounded to the nearest value. The formats are those that AutoAWQ, GPTQModel and
compressed-tensors write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs in an int32 of an AWQ checkpoint, from its lowest four bits to its highest."""
NIBBLES = 8
"""The values of four bits in an int32."""
ONES = 0x11111111
"""An int32 of eight ones."""
FP8_MAX = 448.0

Stored = tuple[dict[str, Tensor], Tensor]
"""The tensors of a module by their last names, and the float32 weights that they mean."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format of quantized weights."""

    config: dict[str, Any]
    """The `quantization_config` of config.json."""
    store: Callable[[Tensor], Stored]
    """Quantizes a weight [num_outputs, num_inputs]."""


def awq(group_size: int = 128) -> Format:
    """AutoAWQ's `gemm` layout, with zero points."""

    def store(weight: Tensor) -> Stored:
        groups = groups_of(weight.shape[1], group_size)
        values, scales, zeros = quantize(weight, groups, symmetric=False)
        tensors = {
            "qweight": packed(values.T, AWQ_ORDER),
            "qzeros": packed(zeros.T, AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
        return tensors, dequantized(values, scales, zeros, groups)

    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    return Format(config | {"zero_point": True, "modules_to_not_convert": ["visual"]}, store)


def gptq(
    group_size: int = 128,
    symmetric: bool = True,
    version: Literal[1, 2] = 1,
    act_order: int | None = None,
) -> Format:
    """GPTQ of version 1, whose stored zero points are one too small, or of version 2.

    GPTQModel subtracts the ones from eight packed values at once: a zero point of 0 borrows from
    the next one.
    `act_order` is the seed of an order of the inputs, as `desc_act` finds it.
    """

    def store(weight: Tensor) -> Stored:
        groups = groups_of(weight.shape[1], group_size)
        if act_order is not None:
            random = torch.Generator().manual_seed(act_order)
            groups = groups[torch.randperm(len(groups), generator=random)]
        values, scales, zeros = quantize(weight, groups, symmetric)
        tensors = {
            "qweight": packed(values).T.contiguous(),
            "qzeros": packed(zeros.T) - (ONES if version == 1 else 0),
            "scales": scales.T.contiguous(),
            "g_idx": groups.int(),
        }
        return tensors, dequantized(values, scales, zeros, groups)

    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": symmetric}
    config |= {"desc_act": act_order is not None, "lm_head": False}
    return Format(config | {"checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]}, store)


def w4a16(group_size: int = 128, symmetric: bool = True) -> Format:
    """compressed-tensors' `pack-quantized`; -1 makes a group of all inputs."""

    def store(weight: Tensor) -> Stored:
        groups = groups_of(weight.shape[1], group_size)
        values, scales, zeros = quantize(weight, groups, symmetric)
        scales = scales.bfloat16()
        tensors = {
            "weight_packed": packed(values),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = packed(zeros.T).T.contiguous()
        return tensors, dequantized(values, scales, zeros, groups)

    strategy = "channel" if group_size == -1 else "group"
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights |= {"group_size": None if group_size == -1 else group_size, "dynamic": False}
    return Format(compressed("pack-quantized", weights, None), store)


def fp8(
    strategy: Literal["tensor", "channel", "block"] = "channel",
    block: tuple[int, int] = (128, 128),
    has_static_inputs: bool = False,
) -> Format:
    """compressed-tensors' `float-quantized`."""

    def store(weight: Tensor) -> Stored:
        num_outputs, num_inputs = weight.shape
        sizes = {"tensor": (num_outputs, num_inputs), "channel": (1, num_inputs), "block": block}
        rows, columns = sizes[strategy]
        wide = F.pad(weight.float(), (0, -num_inputs % columns, 0, -num_outputs % rows))
        blocks = wide.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scales = (blocks.abs().amax((1, 3)) / FP8_MAX).clamp_min(1e-6).bfloat16()
        spread = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        spread = spread[:num_outputs, :num_inputs]
        values = (weight.float() / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        tensors = {
            "weight": values,
            "weight_scale": scales.flatten() if strategy == "tensor" else scales,
        }
        if has_static_inputs:
            tensors["input_scale"] = torch.ones(1, dtype=torch.bfloat16)
        return tensors, values.float() * spread

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    weights |= {"block_structure": list(block) if strategy == "block" else None, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs |= {"strategy": "tensor" if has_static_inputs else "token"}
    inputs |= {"dynamic": not has_static_inputs}
    return Format(compressed("float-quantized", weights, inputs), store)


def compressed(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the `quantization_config` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": ["re:.*lm_head", "re:.*visual.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def groups_of(num_inputs: int, group_size: int) -> Tensor:
    """Return the group of each input, int64 [num_inputs]."""
    size = num_inputs if group_size == -1 else group_size
    return torch.arange(num_inputs) // size


def quantize(weight: Tensor, groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return values of four bits, scales and zero points, all of whose groups have one size.

    uint8 [num_outputs, num_inputs], float16 [num_outputs, num_groups] and uint8 of that shape.
    If it is symmetric, all zero points are 8.
    """
    num_groups = int(groups.max()) + 1
    order = groups.argsort(stable=True)
    grouped = weight.float()[:, order].unflatten(1, (num_groups, -1))
    low, high = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
    widths = torch.maximum(high, -low) / 7 if symmetric else (high - low) / 15
    scales = widths.clamp_min(1e-4).half()
    zeros = torch.full_like(scales, 8) if symmetric else (-low / scales.float()).round()
    zeros = zeros.clamp(0, 15)
    offsets = grouped / scales.float()[..., None] + zeros[..., None]
    values = torch.empty(weight.shape, dtype=torch.uint8)
    values[:, order] = offsets.round().clamp(0, 15).to(torch.uint8).flatten(1)
    return values, scales, zeros.to(torch.uint8)


def dequantized(values: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """Return the weights that these mean, float32 [num_outputs, num_inputs]."""
    return (values.float() - zeros[:, groups].float()) * scales.float()[:, groups]


def packed(values: Tensor, order: Sequence[int] = range(NIBBLES)) -> Tensor:
    """Pack uint8 [n, m] as int32 [n, ceil(m / 8)]: the lowest four bits hold entry order[0]."""
    padded = F.pad(values, (0, -values.shape[1] % NIBBLES)).unflatten(1, (-1, NIBBLES))
    result = torch.zeros(padded.shape[:2], dtype=torch.int32)
    for place, entry in enumerate(order):
        result |= padded[..., entry].int() << 4 * place
    return result


FORMATS = {"awq": awq(), "gptq": gptq(), "w4a16": w4a16(), "fp8": fp8()}
"""The formats of the checkpoints that benchmarks make, by the end of their names."""
