"""The paged kernel of CUDA equals attention written out in float32."""

import pytest
import torch
from services.llm.cuda_attention import PagedAttention, objection_to_pages, parts_of

from services.llm.decoder import rotary_tables
from services.llm.packing import upload
from tests.golden import max_difference
from tests.gpu import CUDA, needs_cuda
from tests.llm import test_attention
from tests.llm.test_attention import plan_of, random_tables, rotated, written_out

pytestmark = needs_cuda
BLOCK_SIZE = 256
NUM_BLOCKS = 40
HEAD_DIM = 128


@pytest.fixture(autouse=True)
def pages_of_256(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("BLOCK_SIZE", BLOCK_SIZE),
        ("NUM_BLOCKS", NUM_BLOCKS),
        ("HEAD_DIM", HEAD_DIM),
    ):
        monkeypatch.setattr(test_attention, name, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(28, 4), (4, 4), (6, 1)])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [1]),
        ([1], [2000]),
        ([1, 1, 1, 1], [1, 700, 256, 257]),
        ([300], [300]),
        ([130], [1500]),
        ([1, 500, 1, 2, 65], [1200, 500, 3, 900, 1024]),
    ],
)
def test_any_mix_equals_attention_written_out(
    query_lens: list[int],
    context_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> None:
    assert objection_to_pages(dtype, HEAD_DIM, BLOCK_SIZE, CUDA) == ""
    plan = plan_of(query_lens, context_lens)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(plan.num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM, generator=random).to(
        CUDA, dtype
    )
    tables = random_tables(plan, random)
    q, *_ = rotated(qkv.float().cpu(), num_heads, num_kv_heads, tables)
    tables = tables[0].to(CUDA), tables[1].to(CUDA)
    cache = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM, generator=random).to(
        CUDA, dtype
    )
    # What nobody owns is not read, be it ever so bad.
    cache[:, 0] = torch.nan
    parts = list(parts_of(plan))
    slots, *uploaded = upload(
        [plan.slot_mapping, *(array for part in parts for array in part.arrays)], CUDA
    )
    step = PagedAttention.of(slots, parts, uploaded)
    found = step.run(qkv, num_heads, num_kv_heads, tables, None, cache)
    expected = written_out(plan, q, cache.float().cpu())
    assert max_difference(found.float().cpu().numpy(), expected.numpy()) < (
        0.03 if dtype is torch.bfloat16 else 0.004
    )


def test_what_lies_beyond_a_sequences_end_does_not_reach_it() -> None:
    plan = plan_of([1, 5], [300, 270])
    qkv = torch.randn(6, 8, HEAD_DIM).to(CUDA, torch.bfloat16)
    tables = rotary_tables(torch.zeros(6, HEAD_DIM // 2, device=CUDA))
    cache = torch.full(
        (2, NUM_BLOCKS, BLOCK_SIZE, 2, HEAD_DIM), torch.nan, dtype=torch.bfloat16, device=CUDA
    )
    for table, context in zip(plan.block_tables, plan.context_lens, strict=True):
        cache.flatten(1, 2)[:, torch.from_numpy(test_attention.slots(table, context)).to(CUDA)] = 1
    parts = list(parts_of(plan))
    slots, *uploaded = upload(
        [plan.slot_mapping, *(array for part in parts for array in part.arrays)], CUDA
    )
    step = PagedAttention.of(slots, parts, uploaded)
    assert step.run(qkv, 4, 2, tables, None, cache).isfinite().all()
