"""Products with weights of eight bits in floating point on a card."""

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.quantized_weights import Fp8Weight
from compute.triton_kernels.packed_product import OUTPUTS, PackedProduct
from compute.triton_kernels.tiling import tiled


class CardFp8Linear(PackedProduct):
    """A `Linear` on a card with float8 weights. Inputs keep their dtype, sums are float32."""

    def __init__(
        self, weight: Fp8Weight, bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Pack the weight on the device.

        Parameters
        ----------
        bias
            is [num_outputs], of any dtype and device.
        dtype
            is that of inputs and outputs.
        """
        tiling = tiled(weight.groups.cpu())
        positions = tiling.positions.to(device)
        values = F.pad(weight.values.view(torch.uint8).to(device), (0, 1))
        scales = weight.scales.to(device, torch.float32)[:, tiling.groups.to(device)].T
        scales = F.pad(scales, (0, -weight.shape[0] % OUTPUTS)).contiguous()
        words = pack_fp8(values.index_select(1, positions))
        super().__init__(words, scales, tiling, weight.shape, bias, dtype)


def pack_fp8(values: Tensor) -> Tensor:
    """Return int32 [padded outputs, n / 4], of the bits of float8, uint8 [num_outputs, n].

    n is a multiple of 16.
    """
    num_outputs = len(values)
    # Input 4a + 2b + c is in word a, at bit 16c + 8b.
    words = values.reshape(num_outputs, -1, 2, 2).mT.reshape(num_outputs, -1).view(torch.int32)
    return F.pad(words, (0, 0, 0, -num_outputs % OUTPUTS))
