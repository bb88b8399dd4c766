"""The small operations between products, by a kernel of our own where there is one for the tensor, by torch elsewhere."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.library import bfloat16_kernels

# Below so many entries waking other threads takes longer than the work.
MIN_ENTRIES_PER_THREAD = 16384


def kernels_for(x: Tensor) -> ctypes.CDLL | None:
    return bfloat16_kernels() if x.dtype is torch.bfloat16 and x.device.type == "cpu" else None


def num_threads_for(num_entries: int) -> int:
    return max(1, min(torch.get_num_threads(), num_entries // MIN_ENTRIES_PER_THREAD))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [n, width] / rms(x) * weight."""
    kernels = kernels_for(x)
    if kernels is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    num_rows, width = x.shape
    x, out = x.contiguous(), x.new_empty(x.shape)
    kernels.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), eps, num_rows, width, num_threads_for(x.numel()))
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[n, 2 * width], gate and up side by side -> silu(gate) * up."""
    kernels = kernels_for(gate_up)
    if kernels is None:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    num_rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    kernels.silu_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, width, num_threads_for(out.numel()))
    return out


def rotate(heads: Tensor, num_heads: int, cos: Tensor, signed_sin: Tensor) -> None:
    """Rotary embedding in float32 and in place of the first `num_heads` heads of [n, heads, head_dim]: entry i of a head turns with
    entry i + head_dim / 2. `cos` and `signed_sin` are float32 [n, head_dim], the first half of the sines negated."""
    kernels = kernels_for(heads)
    if kernels is None:
        turning = heads[:, :num_heads]
        x, half = turning.float(), heads.shape[-1] // 2
        turning.copy_(torch.addcmul(x * cos[:, None], torch.cat((x[..., half:], x[..., :half]), -1), signed_sin[:, None]))
        return
    num_rows, _, dim = heads.shape
    threads = num_threads_for(heads.numel())
    kernels.rotate(heads.data_ptr(), heads.stride(0), cos.data_ptr(), signed_sin.data_ptr(), num_rows, num_heads, dim, threads)
