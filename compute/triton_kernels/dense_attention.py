"""Attention among the rows of each sequence in Triton, without a cache: for vision towers.

It computes with any head size and group of query heads, in bfloat16, float16 and float32. Untried:
no CUDA device was at hand when this was written.
"""

import torch
from torch import Tensor

from compute.triton_kernels.attention_kernels import attend_tiles
from compute.triton_kernels.attention_tiles import (
    Card,
    constants_of,
    softmax_scale,
    tile_of_queries,
)


def attend_sequences(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    starts: Tensor,
    max_len: int,
    causal: bool = False,
) -> Tensor:
    """Attend inside of each sequence. Nothing waits for the device.

    Parameters
    ----------
    q_THD, k_TKD, v_TKD
        the heads of a token lie next to each other, and the tokens of keys and values are equally
        far apart.
    starts
        int32 [num_seqs + 1]: the first row of each sequence, and the end of the last.
    max_len
        no sequence is longer.
    causal
        whether a token sees only itself and those before it.

    Returns
    -------
    Tensor
        [T, H, D]. Rows outside of the sequences are not written.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_TKD.shape[1]
    assert num_heads % num_kv_heads == 0 and k_TKD.stride() == v_TKD.stride()
    assert q_THD.dtype == k_TKD.dtype == v_TKD.dtype
    assert q_THD.stride()[1:] == k_TKD.stride()[1:] == (head_dim, 1)
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    num_seqs = len(starts) - 1
    if num_seqs == 0 or max_len == 0:
        return out
    num_rows = max_len * (num_heads // num_kv_heads)
    tile = tile_of_queries(head_dim, q_THD.dtype, num_rows, Card.of(q_THD.device))
    constants = constants_of(num_heads, num_kv_heads, head_dim, q_THD.dtype, tile)
    attend_tiles[-(-num_rows // tile.rows), num_kv_heads, num_seqs](
        q_THD,
        k_TKD,
        v_TKD,
        out,
        None,
        starts,
        None,
        None,
        None,
        softmax_scale(head_dim),
        0,
        Q_STRIDE=q_THD.stride(0),
        OUT_STRIDE=out.stride(0),
        KEY_STRIDE=k_TKD.stride(0),
        BLOCK_SIZE=0,
        CAUSAL=causal,
        **constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
