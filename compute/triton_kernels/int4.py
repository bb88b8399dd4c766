"""Products with weights of four bits on a card."""

from math import floor, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.quantized_weights import Int4Weight
from compute.triton_kernels.packed_product import OUTPUTS, PackedProduct
from compute.triton_kernels.tiling import tiled


class CardInt4Linear(PackedProduct):
    """A `Linear` on a card with int4 weights. Sums are float32."""

    def __init__(
        self, weight: Int4Weight, bias: Tensor | None, dtype: torch.dtype, device: torch.device
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
        values = F.pad(weight.values.to(device), (0, 1)).index_select(1, positions)
        used = tiling.groups.to(weight.scales.device)
        scales = weight.scales[:, used].to(device)
        zeros = weight.zeros[:, used].to(device)
        # The largest scale becomes 1 to 2, so that float16 holds small ones precisely.
        factor = 2.0 ** floor(log2(scales.abs().max().item() or 1.0))
        pairs = paired(scales / factor, zeros)
        super().__init__(pack_int4(values), pairs, tiling, weight.shape, bias, dtype, factor)


def pack_int4(values: Tensor) -> Tensor:
    """Return int32 [padded outputs, n / 8], of uint8 values [num_outputs, n] from 0 to 15.

    n is a multiple of 32.
    """
    num_outputs = len(values)
    # Input 16a + 4b + 2c + d of a unit is in word b, at bit 16d + 8a + 4c.
    values = values.reshape(num_outputs, -1, 2, 4, 2, 2)
    pairs = values[:, :, :, :, 0] | values[:, :, :, :, 1] << 4
    words = pairs.permute(0, 1, 3, 4, 2).reshape(num_outputs, -1).view(torch.int32)
    return F.pad(words, (0, 0, 0, -num_outputs % OUTPUTS))


def paired(scales: Tensor, zeros: Tensor) -> Tensor:
    """Return int32 [num_groups, padded outputs]: a float16 scale, and a float16 16 + zero above.

    `scales` and `zeros` are [num_outputs, num_groups].
    """
    pairs = torch.stack([scales.half(), zeros.half() + 16], -1)
    words = pairs.view(torch.int32).squeeze(-1).T
    return F.pad(words, (0, -len(scales) % OUTPUTS)).contiguous()
