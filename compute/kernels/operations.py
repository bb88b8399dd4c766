"""The small operations between products, by a kernel of our own where there is one for the tensor,
by torch elsewhere."""

import ctypes
from ctypes import byref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels.library import bfloat16_kernels
from compute.kernels.structures import Paged, Weights

# Below so many entries waking other threads takes longer than the work.
MIN_ENTRIES_PER_THREAD = 16384
# Keys are packed for the kernel in panels of so many.
PANEL = 64
MAX_HEAD_DIM = 256
# A decode's context is divided into parts of so many tokens, as kernels.h has it.
PART_TOKENS = 512
# So many query heads may share a key head.
MAX_GROUP = 16


def kernels_for(x: Tensor) -> ctypes.CDLL | None:
    return bfloat16_kernels() if x.dtype is torch.bfloat16 and x.device.type == "cpu" else None


class PackedWeights:
    """A product's weights [num_outputs, num_inputs], laid out as the kernels read them, by one of
    them or by oneDNN."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        packed: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """`bias` is bfloat16; `scales`, float32, belong to weights of int8."""
        self.kernels = kernels
        self._kept = (packed, bias, scales)
        address = torch.ops.mkldnn.data_ptr(packed) if packed.is_mkldnn else packed.data_ptr()
        bias_address, scales_address = (
            None if tensor is None else tensor.data_ptr() for tensor in (bias, scales)
        )
        self.structure = Weights(address, scales_address, bias_address, *shape)

    def multiply(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """bfloat16 [n, num_inputs] -> [n, num_outputs], with `residual` added where it is given."""
        x = x if x.stride(1) == 1 else x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = x.new_empty(len(x), self.structure.num_outputs)
        self.kernels.linear(
            byref(self.structure),
            x.data_ptr(),
            x.stride(0),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            len(x),
            torch.get_num_threads(),
        )
        return out

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights of some outputs, int64 [n] -> bfloat16 [n, num_inputs]; not for weights of
        int8."""
        outputs = outputs.contiguous()
        width = self.structure.num_inputs
        taken = torch.empty(len(outputs), width, dtype=torch.bfloat16)
        addresses = (byref(self.structure), outputs.data_ptr(), taken.data_ptr())
        self.kernels.take_rows(*addresses, len(outputs), num_threads_for(taken.numel()))
        return taken


def num_threads_for(num_entries: int) -> int:
    return max(1, min(torch.get_num_threads(), num_entries // MIN_ENTRIES_PER_THREAD))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [n, width] / rms(x) * weight."""
    kernels = kernels_for(x)
    if kernels is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    num_rows, width = x.shape
    out = x.new_empty(x.shape)
    x = x.contiguous()
    kernels.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        eps,
        num_rows,
        width,
        num_threads_for(x.numel()),
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[n, 2 * width], gate and up side by side -> silu(gate) * up."""
    kernels = kernels_for(gate_up)
    if kernels is None:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    num_rows = len(gate_up)
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    kernels.silu_mul(
        gate_up.data_ptr(), out.data_ptr(), num_rows, width, num_threads_for(out.numel())
    )
    return out


def rotate(heads: Tensor, num_heads: int, cos: Tensor, signed_sin: Tensor) -> None:
    """Rotary embedding in float32 and in place of the first `num_heads` heads of [n, heads,
    head_dim]: entry i of a head turns with entry i + head_dim / 2. `cos` and `signed_sin` are
    float32 [n, head_dim], the first half of the sines negated."""
    kernels = kernels_for(heads)
    if kernels is None:
        turning = heads[:, :num_heads]
        x = turning.float()
        half = heads.shape[-1] // 2
        turning.copy_(
            torch.addcmul(
                x * cos[:, None], torch.cat((x[..., half:], x[..., :half]), -1), signed_sin[:, None]
            )
        )
        return
    num_rows, _, dim = heads.shape
    threads = num_threads_for(heads.numel())
    kernels.rotate(
        heads.data_ptr(),
        heads.stride(0),
        cos.data_ptr(),
        signed_sin.data_ptr(),
        num_rows,
        num_heads,
        dim,
        threads,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, num_seqs: int = 1, causal: bool = False) -> Tensor:
    """Of sequences of equal lengths that follow each other: q [num_seqs * Q, num_heads, D], k and v
    [num_seqs * C, num_kv_heads, D] -> [num_seqs * Q, num_heads * D]. Where `causal`, the last Q
    of a sequence's C keys are the queries' own."""
    kernels = kernels_for(q)
    if kernels is None or q.shape[2] % 16 or q.shape[2] > MAX_HEAD_DIM:
        return attention_by_torch(q, k, v, num_seqs, causal)
    (num_rows, num_heads, dim) = q.shape
    (num_keys, num_kv_heads, _) = k.shape
    query_len = num_rows // num_seqs
    context_len = num_keys // num_seqs
    out = q.new_empty(num_rows, num_heads * dim)
    workspace = q.new_empty(2 * num_seqs * num_kv_heads * -(-context_len // PANEL) * PANEL * dim)
    kernels.attention(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        v.data_ptr(),
        k.stride(0),
        out.data_ptr(),
        workspace.data_ptr(),
        num_seqs,
        query_len,
        context_len,
        num_heads,
        num_kv_heads,
        dim,
        causal,
        torch.get_num_threads(),
    )
    return out


def attention_by_torch(q: Tensor, k: Tensor, v: Tensor, num_seqs: int, causal: bool) -> Tensor:
    q, k, v = (x.unflatten(0, (num_seqs, -1)).transpose(1, 2) for x in (q, k, v))
    (_, num_heads, query_len, dim) = q.shape
    (_, num_kv_heads, context_len, _) = k.shape
    if num_heads > num_kv_heads:
        # Key heads become the batch and the query heads that share one its heads, so that keys are
        # viewed, not repeated.
        groups = num_heads // num_kv_heads
        q = q.unflatten(1, (num_kv_heads, groups)).flatten(0, 1)
        k, v = (x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (k, v))
    mask = None
    if causal and query_len < context_len:
        mask = torch.ones(query_len, context_len, dtype=torch.bool, device=q.device).tril(
            context_len - query_len
        )
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None)
    return (
        out.reshape(num_seqs, num_heads, query_len, dim)
        .transpose(1, 2)
        .reshape(-1, num_heads * dim)
    )


def store_rows(rows: Tensor, paged: Tensor, slots: Tensor) -> None:
    """Copies rows [n, K, D] to their slots in one layer's keys or values [num_blocks, block_size,
    K, D]."""
    kernels = kernels_for(paged)
    if kernels is None:
        paged.flatten(0, 1).index_copy_(0, slots, rows)
    else:
        kernels.scatter(
            rows.data_ptr(),
            rows.stride(0),
            paged.data_ptr(),
            slots.data_ptr(),
            len(rows),
            rows.shape[1] * rows.shape[2],
        )


def can_attend_blocks(num_heads: int, cache: Tensor) -> bool:
    """Whether `decode_attention` is for so many query heads and such a cache."""
    num_kv_heads, dim = cache.shape[-2:]
    return (
        kernels_for(cache) is not None
        and dim % 32 == 0
        and dim <= MAX_HEAD_DIM
        and num_heads <= MAX_GROUP * num_kv_heads
    )


def decode_attention(q: Tensor, cache: Tensor, tables: Tensor, contexts: Tensor) -> Tensor:
    """Of one query a sequence, q [B, num_heads, D], over the first `contexts` tokens in the blocks
    of its table, in one layer's cache [2, num_blocks, block_size, K, D] -> [B, num_heads * D]."""
    kernels = kernels_for(q)
    assert kernels is not None
    (num_seqs, num_heads, dim) = q.shape
    (_, _, block_size, num_kv_heads, _) = cache.shape
    out = q.new_empty(num_seqs, num_heads * dim)
    paged = Paged(
        keys=cache.data_ptr(),
        values=cache[1].data_ptr(),
        tables=tables.data_ptr(),
        contexts=contexts.data_ptr(),
        table_stride=tables.stride(0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dim=dim,
        block_size=block_size,
    )
    partials = new_partials(contexts.numpy(), num_heads, dim)
    addresses = (q.data_ptr(), q.stride(0), out.data_ptr(), partials.data_ptr())
    kernels.decode_attention(byref(paged), *addresses, num_seqs, torch.get_num_threads())
    return out


def new_partials(contexts: np.ndarray, num_heads: int, dim: int) -> Tensor:
    """Room for what the parts of divided contexts leave to be merged."""
    return torch.empty(int((-(-contexts // PART_TOKENS)).sum()) * num_heads * (dim + 2))
