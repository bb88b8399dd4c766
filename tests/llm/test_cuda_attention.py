"""What the paged kernel is asked for: the kernel is a stand-in that holds the caller to its
contract."""

import pytest
import torch

from services.llm.cuda_attention import PagedAttention, objection_to_pages, parts_of
from services.llm.decoder import rotary_tables
from services.llm.packing import upload
from tests.golden import max_difference
from tests.llm.cuda_on_cpu import CPU, pretend
from tests.llm.test_attention import (
    BLOCK_SIZE,
    HEAD_DIM,
    NUM_BLOCKS,
    plan_of,
    random_tables,
    rotated,
    written_out,
)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [9]),
        ([1, 1, 1, 1], [1, 13, 4, 5]),
        ([7], [7]),
        ([3], [11]),
        ([4, 2], [4, 9]),
        ([1, 5, 1, 2, 6], [12, 5, 3, 9, 20]),
    ],
)
def test_any_mix_equals_attention_written_out(
    monkeypatch: pytest.MonkeyPatch,
    query_lens: list[int],
    context_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
) -> None:
    calls = pretend(monkeypatch)
    plan = plan_of(query_lens, context_lens)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(plan.num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM, generator=random)
    tables = random_tables(plan, random)
    scale = torch.rand(plan.num_tokens, generator=random)
    q, k, v = rotated(qkv, num_heads, num_kv_heads, tables)
    cache = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM, generator=random)
    # What nobody owns is not read, be it ever so bad.
    cache[:, 0] = torch.nan
    parts = list(parts_of(plan))
    slots, *uploaded = upload(
        [plan.slot_mapping, *(array for part in parts for array in part.arrays)], CPU
    )
    step = PagedAttention.of(slots, parts, uploaded)
    found = step.run(qkv, num_heads, num_kv_heads, tables, scale, cache)
    stored = cache.flatten(1, 2)[:, torch.from_numpy(plan.slot_mapping)]
    assert max_difference(stored[0].numpy(), k.numpy()) < 1e-5
    assert stored[1].equal(v)
    expected = written_out(plan, q * scale[:, None, None], cache)
    assert max_difference(found.numpy(), expected.numpy()) < 1e-5
    assert len(calls.num_splits) == (1 in query_lens) + (max(query_lens) > 1)


def test_contexts_are_split_only_where_the_kernel_can_join_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = pretend(monkeypatch)
    plan = plan_of([1, 3], [9, 7])
    parts = list(parts_of(plan))
    slots, *uploaded = upload(
        [plan.slot_mapping, *(array for part in parts for array in part.arrays)], CPU
    )
    for num_heads in (4, 2):
        qkv = torch.randn(4, num_heads + 4, HEAD_DIM)
        tables = rotary_tables(torch.zeros(4, HEAD_DIM // 2))
        cache = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, 2, HEAD_DIM)
        PagedAttention.of(slots, parts, uploaded).run(qkv, num_heads, 2, tables, None, cache)
    assert calls.num_splits == [None, 1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "capability", "objection"),
    [
        (torch.bfloat16, 128, 256, (9, 0), ""),
        (torch.float16, 80, 512, (8, 0), ""),
        (torch.float32, 128, 256, (9, 0), "not torch.float32"),
        (torch.bfloat16, 128, 16, (9, 0), "256 tokens, not 16"),
        (torch.bfloat16, 20, 256, (9, 0), "not 20"),
        (torch.bfloat16, 512, 256, (9, 0), "not 512"),
        (torch.bfloat16, 128, 256, (7, 5), "(8, 0)"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    capability: tuple[int, int],
    objection: str,
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = objection_to_pages(dtype, head_dim, block_size, CPU)
    assert objection in found and bool(found) == bool(objection)


def test_a_torch_without_the_kernel_is_asked_for_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU the real kernel is missing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "_flash_attention_forward" in objection_to_pages(torch.bfloat16, 128, 256, CPU)
