"""The operations of a model besides its products.

Each uses a kernel of ours if there is one for the tensor, in C or in Triton, and torch otherwise.
"""

import ctypes
from ctypes import byref
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compute import triton_kernels
from compute.kernels.library import PORTABLE, bfloat16_kernels
from compute.kernels.structures import (
    CONTEXT_PADDING,
    HEAD_PADDING,
    MAX_GROUP,
    MAX_HEAD_DIM,
    PART_TOKENS,
    Kind,
    PagedStruct,
    WeightsStruct,
)

MIN_ENTRIES_PER_THREAD = 16384
"""With fewer entries a thread takes longer to wake than to do its share."""


def kernels_for(x: Tensor) -> ctypes.CDLL | None:
    """Return the C kernels for this tensor, or None if torch must compute with it."""
    is_ours = x.dtype is torch.bfloat16 and x.device.type == "cpu" and not PORTABLE.get()
    return bfloat16_kernels() if is_ours else None


def triton_kernels_for(x: Tensor) -> ModuleType | None:
    """Return the kernels in Triton for this tensor, or None if there are none for its device."""
    if PORTABLE.get() or not triton_kernels.serve(x.device):
        return None
    from compute.triton_kernels import pointwise  # it imports Triton

    return pointwise


@dataclass(frozen=True, slots=True, eq=False)
class Int4Layout:
    """Where the inputs of int4 weights lie in the packed weights."""

    pieces: Tensor
    """int32 [num_pieces + 1]: where each piece begins and the last one ends, in octets. All inputs
    of a piece are of the same group."""
    order: Tensor | None
    """int32 [inputs, filled up to octets]: the input at each place, or -1 for none. None if the
    inputs are in their own order."""


class PackedWeights:
    """Weights [num_outputs, num_inputs] of a product, packed as the kernels read them.

    A kernel or oneDNN packed them.
    """

    def __init__(
        self,
        kernels: ctypes.CDLL,
        packed: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None = None,
        scales: Tensor | None = None,
        int4: "Int4Layout | None" = None,
    ) -> None:
        """Keep the tensors alive whose addresses the kernels get.

        `shape` is (num_outputs, num_inputs). `bias` is bfloat16 [num_outputs]. `scales`, float32
        [num_outputs], are those of int8 weights, or of int4 weights, which also have a layout.
        """
        self.kernels = kernels
        self._kept = (packed, bias, scales, int4)
        num_outputs, num_inputs = shape
        kind = Kind.BFLOAT16 if scales is None else Kind.INT8 if int4 is None else Kind.INT4
        order = None if int4 is None else int4.order
        self.structure = WeightsStruct(
            packed=torch.ops.mkldnn.data_ptr(packed) if packed.is_mkldnn else packed.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            pieces=None if int4 is None else int4.pieces.data_ptr(),
            order=None if order is None else order.data_ptr(),
            num_outputs=num_outputs,
            num_inputs=num_inputs,
            num_pieces=0 if int4 is None else len(int4.pieces) - 1,
            kind=kind,
        )

    @property
    def num_bytes(self) -> int:
        """The bytes of the weights, which each product reads."""
        packed, _, scales, _ = self._kept
        return nbytes_of(packed) + (0 if scales is None else scales.nbytes)

    def multiply(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return x @ weights.T + bias, plus `residual` if there is one.

        All are bfloat16: x [n, num_inputs], `residual` and the result [n, num_outputs].
        """
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
        """Return the weights of the given outputs, int64 [n] -> bfloat16 [n, num_inputs].

        The weights must be bfloat16, not int8.
        """
        outputs = outputs.contiguous()
        width = self.structure.num_inputs
        taken = torch.empty(len(outputs), width, dtype=torch.bfloat16)
        self.kernels.take_rows(
            byref(self.structure),
            outputs.data_ptr(),
            taken.data_ptr(),
            len(outputs),
            num_threads_for(taken.numel()),
        )
        return taken


def nbytes_of(packed: Tensor) -> int:
    """Return the bytes of a packed tensor, which may be oneDNN's own."""
    return torch.ops.mkldnn._nbytes(packed) if packed.is_mkldnn else packed.nbytes


def num_threads_for(num_entries: int) -> int:
    """Return the number of threads that an operation on this many entries is worth."""
    return max(1, min(torch.get_num_threads(), num_entries // MIN_ENTRIES_PER_THREAD))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight, for x [n, width] and weight [width]."""
    if ours := triton_kernels_for(x):
        return ours.add_rms_norm(x, None, weight, eps)[1]
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


def adds_with_norm(x: Tensor) -> bool:
    """Whether `add_rms_norm` is one kernel for x, so that no product should add to it."""
    return triton_kernels_for(x) is not None


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta and `rms_norm` of it, for x and delta [n, width] and weight [width]."""
    if ours := triton_kernels_for(x):
        return ours.add_rms_norm(x, delta, weight, eps)
    total = x + delta
    return total, rms_norm(total, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return (x - mean(x)) / std(x) * weight + bias, for x [n, width], weight and bias [width]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def gelu(x: Tensor) -> Tensor:
    """Return x * the normal distribution function of x, entry by entry."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the approximation of `gelu` by tanh, for x [n, width]."""
    kernels = kernels_for(x)
    if kernels is None:
        return F.gelu(x, approximate="tanh")
    num_rows, width = x.shape
    out = x.new_empty(x.shape)
    x = x.contiguous()
    kernels.gelu_tanh(x.data_ptr(), out.data_ptr(), num_rows, width, num_threads_for(x.numel()))
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [n, width], for gate and up side by side in [n, 2 * width]."""
    if ours := triton_kernels_for(gate_up):
        return ours.silu_mul(gate_up)
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
    """Apply the rotary embedding to the first `num_heads` heads of [n, heads, head_dim], in place.

    It is computed in float32. Entry i of a head turns with entry i + head_dim / 2. `cos` and
    `signed_sin` are float32 [n, head_dim]; the first half of the sines is negated.
    """
    if ours := triton_kernels_for(heads):
        return ours.rotate(heads, num_heads, cos, signed_sin)
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
    kernels.rotate(
        heads.data_ptr(),
        heads.stride(0),
        cos.data_ptr(),
        signed_sin.data_ptr(),
        num_rows,
        num_heads,
        dim,
        num_threads_for(heads.numel()),
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_seqs: int = 1,
    causal: bool = False,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Return the attention of sequences of equal lengths, which follow each other in the tensors.

    q [num_seqs * Q, num_heads, D], k and v [num_seqs * C, num_kv_heads, D]
    -> [num_seqs * Q, num_heads * D].
    If `causal`, the last Q of a sequence's C keys belong to the queries themselves.
    `bias`, [num_heads, Q, C] in the dtype of q, is added to the scaled scores of every sequence.
    `visible`, bool [num_seqs, C], names the keys that are attended to; every query needs one.
    Both are for models with as many key heads as query heads, and without `causal`.
    """
    is_plain = bias is None and visible is None
    assert is_plain or (not causal and k.shape[1] == q.shape[1])
    kernels = kernels_for(q)
    if kernels is None or q.shape[2] % 2 or q.shape[2] > MAX_HEAD_DIM:
        return attention_by_torch(q, k, v, num_seqs, causal, bias, visible)
    num_rows, num_heads, dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    query_len = num_rows // num_seqs
    context_len = num_keys // num_seqs
    padded_len = -(-context_len // CONTEXT_PADDING) * CONTEXT_PADDING
    padded_dim = -(-dim // HEAD_PADDING) * HEAD_PADDING
    out = q.new_empty(num_rows, num_heads * dim)
    workspace = q.new_empty(2 * num_seqs * num_kv_heads * padded_len * padded_dim)
    if bias is not None:
        assert bias.dtype is q.dtype and bias.shape == (num_heads, query_len, context_len)
        bias = bias if bias.stride(2) == 1 else bias.contiguous()
    mask = None
    if visible is not None:
        assert visible.shape == (num_seqs, context_len)
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    kernels.attention(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        v.data_ptr(),
        k.stride(0),
        None if bias is None else bias.data_ptr(),
        *((0, 0) if bias is None else bias.stride()[:2]),
        None if mask is None else mask.data_ptr(),
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


def attention_by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_seqs: int,
    causal: bool,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Return the same as `attention`, on any device and in any dtype."""
    q, k, v = (x.unflatten(0, (num_seqs, -1)).transpose(1, 2) for x in (q, k, v))
    _, num_heads, query_len, dim = q.shape
    _, num_kv_heads, context_len, _ = k.shape
    mask = None
    if bias is not None:
        mask = bias[None]
    if visible is not None:
        hidden = ~visible[:, None, None]
        mask = torch.zeros((), dtype=q.dtype, device=q.device) if mask is None else mask
        mask = mask.masked_fill(hidden, -torch.inf)
    if num_heads > num_kv_heads:
        # Each key head becomes a batch entry, and the query heads that share it become its heads.
        # So the keys are expanded as views and not copied.
        groups = num_heads // num_kv_heads
        q = q.unflatten(1, (num_kv_heads, groups)).flatten(0, 1)
        k, v = (x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (k, v))
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
    """Copy rows [n, K, D] to their slots, int64 [n], in one layer's keys or values.

    `paged` is [num_blocks, block_size, K, D]. Slot s is entry s % block_size of block
    s // block_size.
    """
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


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
) -> None:
    """Rotate queries and keys in place, then copy keys and values to their slots in the cache.

    Parameters
    ----------
    qkv
        [n, num_heads + 2 * num_kv_heads, head_dim]: query heads, then key heads, then value heads.
    num_heads, num_kv_heads
        The number of query heads, and of key heads.
    cos, signed_sin
        float32 [n, head_dim], as for `rotate`.
    cache
        [2, num_blocks, block_size, num_kv_heads, head_dim] of one layer.
    slots
        int64 [n], as for `store_rows`.
    """
    if ours := triton_kernels_for(qkv):
        return ours.rotate_and_store(qkv, num_heads, num_kv_heads, cos, signed_sin, cache, slots)
    rotate(qkv, num_heads + num_kv_heads, cos, signed_sin)
    _, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
    store_rows(k, cache[0], slots)
    store_rows(v, cache[1], slots)


def can_attend_blocks(num_heads: int, cache: Tensor) -> bool:
    """Return whether `decode_attention` supports this number of query heads with this cache."""
    num_kv_heads, dim = cache.shape[-2:]
    return (
        kernels_for(cache) is not None
        and dim % 32 == 0
        and dim <= MAX_HEAD_DIM
        and num_heads <= MAX_GROUP * num_kv_heads
    )


def decode_attention(q: Tensor, cache: Tensor, tables: Tensor, contexts: Tensor) -> Tensor:
    """Return the attention of one new token per sequence over the tokens in the KV cache.

    q [B, num_heads, D], cache [2, num_blocks, block_size, K, D] of one layer
    -> [B, num_heads * D].
    Sequence b has contexts[b] tokens, in the blocks that row b of `tables` lists in order.
    """
    kernels = kernels_for(q)
    assert kernels is not None
    num_seqs, num_heads, dim = q.shape
    _, _, block_size, num_kv_heads, _ = cache.shape
    out = q.new_empty(num_seqs, num_heads * dim)
    paged = PagedStruct(
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
    kernels.decode_attention(
        byref(paged),
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        partials.data_ptr(),
        num_seqs,
        torch.get_num_threads(),
    )
    return out


def new_partials(contexts: np.ndarray, num_heads: int, dim: int) -> Tensor:
    """Return room for the partial results of divided contexts, float32.

    `contexts` has the number of tokens of each sequence. A part leaves, for each head, `dim`
    weighted sums, the sum of the weights and the greatest score.
    """
    num_parts = int((-(-contexts // PART_TOKENS)).sum())
    return torch.empty(num_parts * num_heads * (dim + 2))
