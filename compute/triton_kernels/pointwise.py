"""The operations between the products: norms with the residual, rotary with the KV write, the gate.

Each reads its tensors once. All compute in float32 and round once, whatever the dtype. LayerNorm
and GELU are left to torch, whose own kernels also read each tensor once.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compute.triton_kernels.variant import Variant

ENTRIES_PER_WARP = 512
"""Entries of a row that one warp normalises: 16 of each thread."""
MAX_WARPS = 16
GATE_ENTRIES = 1024
"""Entries of a row that one program gates."""
HEADS = 8
"""Heads of a token that one program rotates."""


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of x and delta, and the sum / rms(sum) * weight.

    Parameters
    ----------
    x, delta
        [n, width]. Without delta the first result is x itself.
    weight
        [width].
    eps
        Added to the mean square.
    """
    num_rows, width = x.shape
    x = with_dense_rows(x)
    normed = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    total = x
    added = x
    if delta is not None:
        total = torch.empty_like(normed)
        added = with_dense_rows(delta)
    block = triton.next_power_of_2(width)
    if num_rows:
        add_rms_norm_kernel[(num_rows,)](
            x,
            added,
            weight,
            total,
            normed,
            x.stride(0),
            added.stride(0),
            width,
            eps,
            HAS_DELTA=delta is not None,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return total, normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [n, width], for gate and up side by side in [n, 2 * width]."""
    num_rows = len(gate_up)
    width = gate_up.shape[1] // 2
    gate_up = with_dense_rows(gate_up)
    out = gate_up.new_empty(num_rows, width)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, GATE_ENTRIES))
        silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), width, BLOCK=GATE_ENTRIES)
    return out


def rotate(heads: Tensor, num_heads: int, cos: Tensor, signed_sin: Tensor) -> None:
    """Apply the rotary embedding to the first `num_heads` heads of [n, heads, head_dim], in place.

    Entry i of a head turns with entry i + head_dim / 2. `cos` and `signed_sin` are float32
    [n, head_dim]; the first half of the sines is negated.
    """
    _rotate(heads, num_heads, num_heads, cos, signed_sin, None, None)


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
) -> None:
    """Rotate queries and keys in place, and copy keys and values to their slots in the cache.

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
        int64 [n]. Slot s is entry s % block_size of block s // block_size.
    """
    assert qkv.shape[1] == num_heads + 2 * num_kv_heads
    _rotate(qkv, num_heads, num_heads + num_kv_heads, cos, signed_sin, cache, slots)


def _rotate(
    heads: Tensor,
    num_queries: int,
    num_turning: int,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor | None,
    slots: Tensor | None,
) -> None:
    """Rotate the first `num_turning` heads, and store those behind the queries if asked to."""
    num_rows, num_heads, dim = heads.shape
    num_heads = num_turning if cache is None else num_heads
    if num_rows == 0:
        return
    assert heads.stride(2) == 1 and cos.is_contiguous() and signed_sin.is_contiguous()
    assert cache is None or cache.stride(4) == 1
    rotate_kernel[(num_rows, triton.cdiv(num_heads, HEADS))](
        heads,
        cos,
        signed_sin,
        heads if cache is None else cache,
        cos if slots is None else slots,
        heads.stride(0),
        heads.stride(1),
        *((0, 0, 0, 0) if cache is None else cache.stride()[:4]),
        num_heads,
        num_queries,
        num_turning,
        1 if cache is None else cache.shape[2],
        HALF=dim // 2,
        HEADS=HEADS,
        BLOCK=triton.next_power_of_2(dim // 2),
        STORES=cache is not None,
    )


def with_dense_rows(x: Tensor) -> Tensor:
    """Return x [n, width] with entries of a row that follow each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def warps_for(num_entries: int) -> int:
    """Return the number of warps for a row, a power of two."""
    return max(1, min(MAX_WARPS, num_entries // ENTRIES_PER_WARP))


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    x_stride,
    delta_stride,
    width,
    eps,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has one row, and BLOCK is at least the width."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, BLOCK)
    exists = entries < width
    x = tl.load(x_ptr + row * x_stride + entries, mask=exists, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * delta_stride + entries, mask=exists, other=0.0)
        # What is normalised is what the next layer reads: the rounded sum.
        total = (x + delta.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + entries, total, mask=exists)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + entries, mask=exists, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * width + entries, x * scale * weight, mask=exists)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    """A program has BLOCK entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = entries < width
    gates = gate_up_ptr + row * stride + entries
    gate = tl.load(gates, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=exists, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row * width + entries, silu * up, mask=exists)


@triton.jit
def rotate_kernel(
    heads_ptr,
    cos_ptr,
    signed_sin_ptr,
    cache_ptr,
    slots_ptr,
    row_stride,
    head_stride,
    kind_stride,
    block_stride,
    slot_stride,
    kv_head_stride,
    num_heads,
    num_queries,
    num_turning,
    block_size,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STORES: tl.constexpr,
):
    """A program has HEADS heads of one token, and BLOCK is at least half a head."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, BLOCK)
    is_entry = entries < HALF
    table = row * (2 * HALF) + entries
    cos = tl.load(cos_ptr + table, mask=is_entry, other=0.0)[None]
    cos_behind = tl.load(cos_ptr + table + HALF, mask=is_entry, other=0.0)[None]
    sin = tl.load(signed_sin_ptr + table, mask=is_entry, other=0.0)[None]
    sin_behind = tl.load(signed_sin_ptr + table + HALF, mask=is_entry, other=0.0)[None]

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists = (head < num_heads)[:, None] & is_entry[None]
    turns = (head < num_turning)[:, None]
    places = heads_ptr + row * row_stride + head[:, None] * head_stride + entries[None]
    x = tl.load(places, mask=exists, other=0.0).to(tl.float32)
    y = tl.load(places + HALF, mask=exists, other=0.0).to(tl.float32)
    turned_x = tl.where(turns, x * cos + y * sin, x)
    turned_y = tl.where(turns, y * cos_behind + x * sin_behind, y)
    tl.store(places, turned_x, mask=exists & turns)
    tl.store(places + HALF, turned_y, mask=exists & turns)

    if STORES:
        slot = tl.load(slots_ptr + row)
        num_kv_heads = num_turning - num_queries
        kv_head = head - num_queries
        kind = (kv_head >= num_kv_heads).to(tl.int64)
        kv_head -= kind.to(tl.int32) * num_kv_heads
        token = cache_ptr + slot // block_size * block_stride + slot % block_size * slot_stride
        kept = kind * kind_stride + kv_head * kv_head_stride
        cached = token + kept[:, None] + entries[None]
        is_kept = exists & (head >= num_queries)[:, None]
        tl.store(cached, turned_x, mask=is_kept)
        tl.store(cached + HALF, turned_y, mask=is_kept)


def variants() -> Sequence[Variant]:
    """Return the specialisations for a model of 7B: width 3584, heads of 128."""
    return [variant for dtype in ("bf16", "fp32") for variant in variants_of(dtype)]


def variants_of(dtype: str) -> Iterator[Variant]:
    norm = {
        **dict.fromkeys(
            ("x_ptr", "delta_ptr", "weight_ptr", "total_ptr", "normed_ptr"), f"*{dtype}"
        ),
        **dict.fromkeys(("x_stride", "delta_stride", "width"), "i32"),
        "eps": "fp32",
        **dict.fromkeys(("HAS_DELTA", "BLOCK"), "constexpr"),
    }
    for has_delta in (False, True):
        yield Variant(
            f"{'add and ' if has_delta else ''}rms norm {dtype}",
            add_rms_norm_kernel,
            norm,
            {"HAS_DELTA": has_delta, "BLOCK": 4096},
            num_warps=warps_for(4096),
        )
    yield Variant(
        f"silu and product {dtype}",
        silu_mul_kernel,
        {
            **dict.fromkeys(("gate_up_ptr", "out_ptr"), f"*{dtype}"),
            **dict.fromkeys(("stride", "width"), "i32"),
            "BLOCK": "constexpr",
        },
        {"BLOCK": GATE_ENTRIES},
    )
    for dim, stores in ((128, True), (80, False)):
        yield Variant(
            f"rotate{' and store' if stores else ''} {dtype}, heads of {dim}",
            rotate_kernel,
            rotate_signature(dtype, stores),
            {
                "HALF": dim // 2,
                "HEADS": HEADS,
                "BLOCK": triton.next_power_of_2(dim // 2),
                "STORES": stores,
            },
        )


def rotate_signature(dtype: str, stores: bool) -> dict[str, str]:
    constants = ("HALF", "HEADS", "BLOCK", "STORES")
    signature = dict.fromkeys(rotate_kernel.arg_names, "i32")
    signature |= dict.fromkeys(("heads_ptr", "cache_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("cos_ptr", "signed_sin_ptr"), "*fp32")
    signature |= {"slots_ptr": "*i64" if stores else "*fp32", "kind_stride": "i64"}
    return signature | dict.fromkeys(constants, "constexpr")
