"""A stand-in for torch-npu: its operators as they are documented, written out for the CPU.

They compute in any dtype; all else that an operator asks for, the caller is held to.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


class Operators:
    """The operators, and how often each was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reshape_and_cache(
        self,
        *,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_indices: Tensor,
    ) -> None:
        """Write rows [T, K, D] to their slots in [num_blocks, block_size, K, D]."""
        self.calls.append("store")
        assert slot_indices.dtype == torch.int32
        for rows, cache in ((key, key_cache), (value, value_cache)):
            assert rows.is_contiguous() and cache.is_contiguous()
            assert cache.dim() == 4 and rows.shape[1:] == cache.shape[2:]
            assert rows.dtype == cache.dtype and len(rows) == len(slot_indices)
            cache.flatten(0, 1)[slot_indices.long()] = rows

    def fused_infer_attention_score(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        atten_mask: Tensor,
        block_table: Tensor,
        input_layout: str,
        block_size: int,
        actual_seq_lengths: list[int],
        actual_seq_lengths_kv: list[int],
        num_heads: int,
        num_key_value_heads: int,
        scale: float,
        sparse_mode: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention over a paged cache, in the layout TND and the mode right-down causal."""
        self.calls.append("attend")
        assert input_layout == "TND" and sparse_mode == 3
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        assert query.dtype == key.dtype == value.dtype
        num_tokens, heads, head_dim = query.shape
        assert heads == num_heads and num_heads % num_key_value_heads == 0
        assert key.shape == value.shape and key.dim() == 3
        assert key.shape[1:] == (block_size, num_key_value_heads * head_dim)
        assert atten_mask.dtype == torch.int8 and atten_mask.shape == (2048, 2048)
        assert atten_mask.equal(torch.ones_like(atten_mask).triu(1))
        assert block_table.dtype == torch.int32 and block_table.is_contiguous()
        assert all(type(n) is int for n in actual_seq_lengths + actual_seq_lengths_kv)
        assert len(actual_seq_lengths) == len(actual_seq_lengths_kv) == len(block_table)
        assert actual_seq_lengths == sorted(actual_seq_lengths)
        assert actual_seq_lengths[-1] == num_tokens, "the ends of the sequences, not their lengths"
        out = torch.empty_like(query)
        start = 0
        for table, end, length in zip(
            block_table.long(), actual_seq_lengths, actual_seq_lengths_kv, strict=True
        ):
            assert length <= block_table.shape[1] * block_size
            k, v = (
                pages[table].reshape(-1, num_key_value_heads, head_dim)[:length]
                for pages in (key, value)
            )
            out[start:end] = attend(query[start:end], k, v, scale)
            start = end
        return out, torch.empty(0)


def attend(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, scale: float) -> Tensor:
    """The last query sees all keys, each one before it a key less."""
    k, v = (x.repeat_interleave(q_THD.shape[1] // x.shape[1], 1) for x in (k_SKD, v_SKD))
    scores = torch.einsum("thd,shd->hts", q_THD, k) * scale
    visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q_THD))
    return torch.einsum("hts,shd->thd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def pretend(
    monkeypatch: pytest.MonkeyPatch, device_count: Callable[[], int] = lambda: 2
) -> Operators:
    """Let `import torch_npu` find the stand-in."""
    operators = Operators()
    module: Any = ModuleType("torch_npu")
    module.__spec__ = ModuleSpec("torch_npu", None)
    module.npu = SimpleNamespace(device_count=device_count)
    module._npu_reshape_and_cache = operators.reshape_and_cache
    module.npu_fused_infer_attention_score = operators.fused_infer_attention_score
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return operators
