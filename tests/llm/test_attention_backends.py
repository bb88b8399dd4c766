"""What each backend asks of its kernel: the kernels of others are stand-ins that hold the caller
to their contracts, and our own run under Triton's interpreter."""

from typing import Any

import pytest
import torch

from compute import triton_kernels
from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.by_flashinfer import ByFlashInfer, PlanGuard
from services.llm.attention_backends.by_triton import ByTriton
from services.llm.attention_backends.by_varlen import ByVarlen, kernel
from services.llm.attention_backends.protocol import PagedAttention, PagedBackend, Shapes
from services.llm.attention_backends.trials import Room, objection_to, times_of, try_backend
from services.llm.decoder import rotary_tables
from services.llm.packing import upload
from services.llm.step_plan import StepPlan
from tests.golden import max_difference
from tests.llm.cuda_on_cpu import CPU, CapturedDecodes, CopyEvent, pretend
from tests.llm.test_attention import (
    BLOCK_SIZE,
    HEAD_DIM,
    NUM_BLOCKS,
    plan_of,
    random_tables,
    rotated,
    written_out,
)

needs_triton = pytest.mark.skipif(
    not triton_kernels.is_installed(), reason="Triton is not installed"
)
NAMES = [pytest.param("triton", marks=needs_triton), "varlen", "flashinfer"]


def shapes_of(num_heads: int = 4, num_kv_heads: int = 2, **other: object) -> Shapes:
    values = {"head_dim": HEAD_DIM, "dtype": torch.float32, "block_size": BLOCK_SIZE} | other
    return Shapes(num_heads=num_heads, num_kv_heads=num_kv_heads, **values)


def step_of(kind: type[PagedBackend], shapes: Shapes, plan: StepPlan) -> PagedAttention:
    planned = kind(shapes, CPU).of_plan(plan)
    slots, *uploaded = upload([plan.slot_mapping, *planned.arrays], CPU)
    return PagedAttention(slots, planned.bind([array.int() for array in uploaded]))


@pytest.mark.parametrize("name", NAMES)
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
    name: str,
    query_lens: list[int],
    context_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
) -> None:
    pretend(monkeypatch)
    plan = plan_of(query_lens, context_lens)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(plan.num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM, generator=random)
    tables = random_tables(plan, random)
    scale = torch.rand(plan.num_tokens, generator=random)
    q, k, v = rotated(qkv, num_heads, num_kv_heads, tables)
    cache = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM, generator=random)
    # What nobody owns is not read, be it ever so bad.
    cache[:, 0] = torch.nan
    step = step_of(BACKENDS[name], shapes_of(num_heads, num_kv_heads), plan)
    found = step.run(qkv, num_heads, num_kv_heads, tables, scale, cache)
    stored = cache.flatten(1, 2)[:, torch.from_numpy(plan.slot_mapping)]
    assert max_difference(stored[0].numpy(), k.numpy()) < 1e-5
    assert stored[1].equal(v)
    expected = written_out(plan, q * scale[:, None, None], cache)
    assert max_difference(found.numpy(), expected.numpy()) < 1e-5


def test_varlen_splits_contexts_only_where_the_kernel_can_join_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = pretend(monkeypatch)
    plan = plan_of([1, 3], [9, 7])
    for num_heads in (4, 2):
        qkv = torch.randn(4, num_heads + 4, HEAD_DIM)
        tables = rotary_tables(torch.zeros(4, HEAD_DIM // 2))
        cache = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, 2, HEAD_DIM)
        step = step_of(ByVarlen, shapes_of(num_heads), plan)
        step.run(qkv, num_heads, 2, tables, None, cache)
    assert calls.num_splits == [None, 1, 1, 1]


@pytest.mark.parametrize(
    ("values", "capability", "objection"),
    [
        ({"dtype": torch.bfloat16, "head_dim": 128, "block_size": 256}, (9, 0), ""),
        ({"dtype": torch.float16, "head_dim": 80, "block_size": 512}, (8, 0), ""),
        ({"head_dim": 128, "block_size": 256}, (9, 0), "not torch.float32"),
        ({"dtype": torch.bfloat16, "block_size": 16}, (9, 0), "256 tokens, not 16"),
        ({"dtype": torch.bfloat16, "head_dim": 20}, (9, 0), "not 20"),
        ({"dtype": torch.bfloat16, "head_dim": 512}, (9, 0), "not 512"),
        ({"dtype": torch.bfloat16, "block_size": 256}, (7, 5), "8.0"),
    ],
)
def test_varlen_says_what_it_does_not_compute(
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, object],
    capability: tuple[int, int],
    objection: str,
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr("services.llm.attention_backends.by_varlen.kernel", lambda: print)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = ByVarlen.objection(shapes_of(**values), torch.device("cuda"))
    assert objection in found and bool(found) == bool(objection)


def test_a_torch_whose_kernel_takes_no_block_table_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.11 has varlen_attn with fewer arguments, and older ones have none."""
    shapes = shapes_of(dtype=torch.bfloat16, block_size=256)
    assert kernel() is not None

    def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        pass

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_torch_2_11)
    assert kernel() is None
    assert "takes no block table" in ByVarlen.objection(shapes, CPU)
    monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    assert kernel() is None


def test_a_torch_without_the_kernel_is_an_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the real kernel is missing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    shapes = shapes_of(dtype=torch.bfloat16, head_dim=128, block_size=256)
    assert "_flash_attention_forward" in objection_to(ByVarlen, shapes, CPU)


@pytest.mark.parametrize(
    ("values", "objection"),
    [
        ({"dtype": torch.bfloat16, "head_dim": 128}, ""),
        ({"dtype": torch.float16, "head_dim": 64}, ""),
        ({"head_dim": 128}, "not torch.float32"),
        ({"dtype": torch.bfloat16, "head_dim": 80}, "not 80"),
    ],
)
def test_flashinfer_says_what_it_does_not_compute(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, object], objection: str
) -> None:
    assert "the extra `flashinfer`" in ByFlashInfer.objection(shapes_of(**values), CPU)
    pretend(monkeypatch)
    found = ByFlashInfer.objection(shapes_of(**values), CPU)
    assert objection in found and bool(found) == bool(objection)


def test_a_plan_waits_until_the_card_has_copied_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", CopyEvent)
    asked: list[str] = []
    monkeypatch.setattr(CopyEvent, "asked", asked)
    guard = PlanGuard()
    for _ in range(2):
        guard.plan(lambda: asked.append("plan"))
    assert asked == ["plan", "record", "synchronize", "plan", "record"]


def test_our_kernels_run_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(triton_kernels, "objection", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "not on cpu" in ByTriton.objection(shapes_of(), CPU)
    assert ByTriton.objection(shapes_of(), cuda) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in ByTriton.objection(shapes_of(), cuda)
    monkeypatch.setattr(triton_kernels, "objection", lambda: "no compiler")
    assert ByTriton.objection(shapes_of(), cuda) == "no compiler"


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_that_computes_attention_is_accepted_and_timed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(BACKENDS[name], "objection", lambda shapes, device: "")
    monkeypatch.setattr("services.llm.attention_backends.trials.PROBES", ((1, 1), (1, 20), (5, 17)))
    monkeypatch.setattr("services.llm.attention_backends.trials.CONTEXT", 20)
    monkeypatch.setattr("services.llm.attention_backends.trials.BATCH", 3)
    monkeypatch.setattr("services.llm.attention_backends.trials.CALLS", 2)
    shapes = shapes_of(block_size=16)
    assert objection_to(BACKENDS[name], shapes, CPU) == ""
    times = times_of(BACKENDS[name](shapes, CPU), shapes, Room(5, 40), CPU)
    assert len(times) == 3 and min(times) > 0


@pytest.mark.parametrize("broken", ["a mixed step", "decodes"])
def test_a_backend_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    pretend(monkeypatch)
    kind = ByVarlen if broken == "a mixed step" else ByFlashInfer
    monkeypatch.setattr(kind, "objection", lambda shapes, device: "")
    if broken == "decodes":
        right = CapturedDecodes.run
        monkeypatch.setattr(CapturedDecodes, "run", lambda *given: right(*given).roll(1, 0))
    else:
        monkeypatch.setattr(
            "tests.llm.cuda_on_cpu.attend", lambda q, k, v: torch.full_like(q, torch.nan)
        )
    assert f"the results of {broken} are wrong" in objection_to(kind, shapes_of(), CPU)


def test_a_backend_that_reads_beyond_the_end_of_a_sequence_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = pretend(monkeypatch)
    monkeypatch.setattr(ByVarlen, "objection", lambda shapes, device: "")

    def careless(*given: torch.Tensor, **named: object) -> torch.Tensor:
        return calls(*given, **named) + 0 * given[2].sum()

    monkeypatch.setattr("services.llm.attention_backends.by_varlen.kernel", lambda: careless)
    assert "wrong by nan" in objection_to(ByVarlen, shapes_of(), CPU)


def test_a_backend_without_memory_for_the_largest_graph_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(ByFlashInfer, "objection", lambda shapes, device: "")
    plan = CapturedDecodes.plan

    def plan_few(wrapper: CapturedDecodes, indptr: torch.Tensor, *given: Any, **named: Any) -> None:
        if len(indptr) > 65:
            raise RuntimeError("Buffer overflow")
        plan(wrapper, indptr, *given, **named)

    monkeypatch.setattr(CapturedDecodes, "plan", plan_few)
    trial = try_backend(ByFlashInfer, shapes_of(), Room(65, 40), CPU)
    assert trial.objection == "RuntimeError: Buffer overflow"
