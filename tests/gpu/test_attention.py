"""Each backend of attention on CUDA equals attention written out in float32."""

import pytest
import torch

from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.protocol import PagedAttention, PagedBackend, Shapes
from services.llm.decoder import rotary_tables
from services.llm.packing import upload
from services.llm.step_plan import StepPlan
from tests.golden import max_difference
from tests.gpu import CUDA, backend_for, needs_cuda
from tests.llm import test_attention
from tests.llm.test_attention import plan_of, random_tables, rotated, written_out

pytestmark = needs_cuda
MAX_TOKENS = 40 * 256
HEAD_DIM = 128
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.004}
SETTINGS = [
    ("triton", torch.float32),
    *((name, dtype) for name in BACKENDS for dtype in (torch.bfloat16, torch.float16)),
]


def prepared(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[type[PagedBackend], Shapes]:
    """Return a backend and shapes with its own blocks, for which plans are made from now on."""
    block_size = BACKENDS[name].block_size
    for constant, value in (
        ("BLOCK_SIZE", block_size),
        ("NUM_BLOCKS", MAX_TOKENS // block_size),
        ("HEAD_DIM", HEAD_DIM),
    ):
        monkeypatch.setattr(test_attention, constant, value)
    shapes = Shapes(num_heads, num_kv_heads, HEAD_DIM, dtype, block_size)
    return backend_for(name, shapes), shapes


def step_of(kind: type[PagedBackend], shapes: Shapes, plan: StepPlan) -> PagedAttention:
    planned = kind(shapes, CUDA).of_plan(plan)
    slots, *uploaded = upload([plan.slot_mapping, *planned.arrays], CUDA)
    return PagedAttention(slots, planned.bind([array.int() for array in uploaded]))


def size_of_cache(shapes: Shapes) -> tuple[int, ...]:
    num_blocks = MAX_TOKENS // shapes.block_size
    return 2, num_blocks, shapes.block_size, shapes.num_kv_heads, HEAD_DIM


@pytest.mark.parametrize(("name", "dtype"), SETTINGS)
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
    monkeypatch: pytest.MonkeyPatch,
    query_lens: list[int],
    context_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    name: str,
    dtype: torch.dtype,
) -> None:
    kind, shapes = prepared(monkeypatch, name, dtype, num_heads, num_kv_heads)
    plan = plan_of(query_lens, context_lens)
    random = torch.Generator().manual_seed(0)
    size = (plan.num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM)
    qkv = torch.randn(size, generator=random).to(CUDA, dtype)
    tables = random_tables(plan, random)
    scale = torch.rand(plan.num_tokens, generator=random).to(dtype)
    q, *_ = rotated(qkv.float().cpu(), num_heads, num_kv_heads, tables)
    tables = tables[0].to(CUDA), tables[1].to(CUDA)
    cache = torch.randn(size_of_cache(shapes), generator=random).to(CUDA, dtype)
    # What nobody owns is not read, be it ever so bad.
    cache[:, 0] = torch.nan
    step = step_of(kind, shapes, plan)
    found = step.run(qkv, num_heads, num_kv_heads, tables, scale.to(CUDA), cache)
    expected = written_out(plan, q * scale.float()[:, None, None], cache.float().cpu())
    difference = max_difference(found.float().cpu().numpy(), expected.numpy())
    assert difference < TOLERANCES[dtype]


@pytest.mark.parametrize(("name", "dtype"), SETTINGS)
def test_what_lies_beyond_a_sequences_end_does_not_reach_it(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    kind, shapes = prepared(monkeypatch, name, dtype, 4, 2)
    plan = plan_of([1, 5], [300, 270])
    qkv = torch.randn(6, 8, HEAD_DIM).to(CUDA, dtype)
    tables = rotary_tables(torch.zeros(6, HEAD_DIM // 2, device=CUDA))
    cache = torch.full(size_of_cache(shapes), torch.nan, dtype=dtype, device=CUDA)
    for table, context in zip(plan.block_tables, plan.context_lens, strict=True):
        cache.flatten(1, 2)[:, torch.from_numpy(test_attention.slots(table, context)).to(CUDA)] = 1
    step = step_of(kind, shapes, plan)
    assert step.run(qkv, 4, 2, tables, None, cache).isfinite().all()
