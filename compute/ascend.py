"""Everything that Ascend NPUs need: the device, its memory, its collectives, its attention.

torch-npu makes them a device of torch, so most of what computes is torch's own. This file holds the
rest, and every call of torch-npu. docs/ascend.md says what the calls ask for. Untried: no NPU was
at hand when this was written.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

COLLECTIVES = "hccl"
"""The backend of torch.distributed. It is there once torch-npu is imported."""
BLOCK_SIZE = 128
"""Tokens of a block of the KV cache."""
MAX_BLOCK_SIZE = 512
HEAD_DIM = 128
"""The only size of a head for which the attention of ragged batches is documented."""
MASK_SIZE = 2048
"""The rows and columns of the mask that stands for a causal mask of any size."""
RIGHT_DOWN_CAUSAL = 3
"""The sparse mode in which the last query of a sequence sees all its keys."""


def objection() -> str:
    """Return why no NPU can be used here; "" if one can."""
    if importlib.util.find_spec("torch_npu") is None:
        return "it needs the package torch-npu, which is not installed (docs/ascend.md)"
    try:
        count = npu().device_count()
    except (ImportError, RuntimeError) as e:
        return f"torch-npu does not start: {e}; source the set_env.sh of CANN (docs/ascend.md)"
    return "" if count else "torch-npu sees no NPU here; look at what npu-smi info prints"


def npu() -> ModuleType:
    """Return the part of torch-npu that manages NPUs, as torch.cuda manages CUDA cards."""
    import torch_npu  # adds torch.npu, and "hccl" to torch.distributed

    return torch_npu.npu


def objection_to_attention(dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Return why `attend` cannot read such a KV cache; "" if it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the NPU's attention takes float16 and bfloat16, not {dtype}"
    if head_dim != HEAD_DIM:
        return f"the NPU's attention takes heads of {HEAD_DIM}, not {head_dim}"
    if block_size % BLOCK_SIZE or block_size > MAX_BLOCK_SIZE:
        return (
            f"the NPU's attention takes blocks of a multiple of {BLOCK_SIZE} tokens up to "
            f"{MAX_BLOCK_SIZE}, not {block_size}"
        )
    return ""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of a batch, one after the other."""

    query_ends: list[int]
    """The end of each sequence's rows in the batch."""
    context_lens: list[int]
    """The tokens of each in the KV cache, the new ones included."""
    block_tables: Tensor
    """int32 [num_seqs, max_num_blocks]."""


def store(k_TKD: Tensor, v_TKD: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values to the cache of a layer, [2, num_blocks, block_size, K, D].

    `slots` are int32 [T]: block * block_size + offset of each token.
    """
    import torch_npu

    torch_npu._npu_reshape_and_cache(
        key=k_TKD.contiguous(),
        value=v_TKD.contiguous(),
        key_cache=kv_cache[0],
        value_cache=kv_cache[1],
        slot_indices=slots,
    )


def attend(q_THD: Tensor, kv_cache: Tensor, sequences: Sequences) -> Tensor:
    """Return the attention of a batch over the cache of a layer, [T, H, D].

    `kv_cache` is [2, num_blocks, block_size, K, D]. Decodes and chunks of prompts may be mixed. The
    last query of a sequence sees its whole context, and each one before it a token less.
    """
    import torch_npu

    block_size, num_kv_heads, head_dim = kv_cache.shape[2:]
    keys, values = kv_cache.flatten(3)
    attended, _ = torch_npu.npu_fused_infer_attention_score(
        q_THD.contiguous(),
        keys,
        values,
        atten_mask=causal_mask(q_THD.device),
        block_table=sequences.block_tables,
        input_layout="TND",
        block_size=block_size,
        actual_seq_lengths=sequences.query_ends,
        actual_seq_lengths_kv=sequences.context_lens,
        num_heads=q_THD.shape[1],
        num_key_value_heads=num_kv_heads,
        scale=head_dim**-0.5,
        sparse_mode=RIGHT_DOWN_CAUSAL,
    )
    return attended


@cache
def causal_mask(device: torch.device) -> Tensor:
    """Return the mask that stands for a causal one, int8 [MASK_SIZE, MASK_SIZE], 1 for hidden."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8, device=device).triu(1)
