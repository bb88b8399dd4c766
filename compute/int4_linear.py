"""Products with weights of four bits, on a CPU."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels.library import int8_kernels, panel_of
from compute.kernels.operations import Int4Layout, PackedWeights
from compute.kernels.structures import MAX_PIECE_INPUTS, OCTET
from compute.quantized_weights import Int4Weight

MISSING = -1
HEADER_BYTES = 3
"""The bytes of a scale and a zero."""


class Int4Linear:
    """A `Linear` on a CPU with int4 weights, and bfloat16 inputs and outputs. Sums are float32.

    Scales are kept as float16, apart from a power of two for each output.
    """

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None) -> None:
        """`bias` is bfloat16 [num_outputs]."""
        kernels = int8_kernels()
        assert kernels is not None, "check_quantization comes first"
        pieces, groups, order = arranged(weight.groups)
        in_order = order.equal(torch.arange(len(weight.groups), dtype=order.dtype))
        layout = Int4Layout(pieces, None if in_order else order)
        values = weight.values if in_order else weight.values[:, order.clamp(min=0)]
        values = values.contiguous()
        factors = powers_of_two(weight.scales)
        scales = (weight.scales / factors[:, None])[:, groups].half().contiguous()
        zeros = weight.zeros[:, groups].contiguous()
        packed = torch.empty(
            packed_bytes(panel_of(kernels, "INT4_PANEL"), len(values), len(groups), len(order)),
            dtype=torch.uint8,
        )
        kernels.pack_int4(
            values.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            pieces.data_ptr(),
            packed.data_ptr(),
            len(values),
            len(groups),
        )
        self.packed = PackedWeights(kernels, packed, weight.shape, bias, factors, layout)
        self.max_kernel_rows = sys.maxsize

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [n, num_inputs] -> [n, num_outputs], plus `residual` if given."""
        return self.packed.multiply(x, residual)


def arranged(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pieces in which the inputs of these groups, int64 [num_inputs], are packed.

    They are `Int4Layout.pieces`, the group of each piece, and the input at each place.
    """
    order: list[Tensor] = []
    ends = [0]
    group_of: list[int] = []
    for group in groups.unique().tolist():
        for piece in (groups == group).nonzero()[:, 0].split(MAX_PIECE_INPUTS):
            order.append(F.pad(piece, (0, -len(piece) % OCTET), value=MISSING))
            ends.append(ends[-1] + len(order[-1]) // OCTET)
            group_of.append(group)
    return (
        torch.tensor(ends, dtype=torch.int32),
        torch.tensor(group_of),
        torch.cat(order).to(torch.int32),
    )


def powers_of_two(scales: Tensor) -> Tensor:
    """Return the power of two next to the greatest scale of each output, float32 [num_outputs].

    The quotients of the scales neither overflow float16, nor are they rounded more than needed.
    """
    _, exponents = torch.frexp(scales.abs().amax(1))
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def packed_bytes(panel: int, num_outputs: int, num_pieces: int, num_inputs: int) -> int:
    """Return the bytes of packed weights whose inputs are filled up to octets."""
    num_panels = -(-num_outputs // panel)
    return num_panels * panel * (num_pieces * HEADER_BYTES + num_inputs // 2)
