"""The language model on CUDA equals the reference, eagerly and by graphs."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from benchmarks.gpu.counts import plan_of
from common.checkpoint import open_checkpoint
from common.settings import LlmSettings
from compute.device import Device
from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.choice import choose_attention, shapes_of
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.parallel import Shard
from services.llm.step_plan import StepPlan
from tests.golden import CASES, GoldenCase, max_difference
from tests.gpu import CUDA, backend_for, needs_cuda
from tests.llm import test_model_runner
from tests.llm.test_model_runner import BFLOAT16_DIFFERENCE, BLOCK_SIZE, NUM_BLOCKS, forced_logits

pytestmark = needs_cuda
MAX_NUM_SEQS = 20
SETTINGS = [
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("varlen", torch.bfloat16),
    ("flashinfer", torch.bfloat16),
]


class Fetching(CudaModelRunner):
    """Its logits come to the host."""

    def execute(self, plan: StepPlan, embeddings: list[torch.Tensor]) -> torch.Tensor:
        return super().execute(plan, embeddings).cpu()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


def runner_of(
    case: GoldenCase,
    name: str,
    dtype: torch.dtype,
    kind: type[CudaModelRunner] = CudaModelRunner,
) -> CudaModelRunner:
    checkpoint = open_checkpoint(case.checkpoint)
    block_size = BACKENDS[name].block_size
    backend = backend_for(name, shapes_of(checkpoint.sizes, Shard(), dtype, block_size))
    runner = kind(
        checkpoint,
        dtype,
        CUDA,
        NUM_BLOCKS,
        block_size,
        max_num_seqs=MAX_NUM_SEQS,
        attention=backend,
    )
    assert runner._graphs is not None
    return runner


@contextmanager
def nothing_waits_for_the_device() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_float32(logits: np.ndarray, case: GoldenCase) -> None:
    assert max_difference(logits, case.tensors["greedy_logits"]) < 1e-3
    assert logits.argmax(1).tolist() == case.expected["greedy_ids"]


@pytest.mark.parametrize("chunk", [1000, 7])
def test_float32_logits_equal_the_reference_where_blocks_are_gathered(
    case: GoldenCase, chunk: int
) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    runner = Fetching(checkpoint, torch.float32, CUDA, NUM_BLOCKS, BLOCK_SIZE, attention=None)
    check_float32(forced_logits(runner, case, chunk), case)


@pytest.mark.parametrize(("name", "dtype"), SETTINGS)
@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_are_as_near_to_the_reference_as_its_own_dtype_is(
    case: GoldenCase, name: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_model_runner, "BLOCK_SIZE", BACKENDS[name].block_size)
    logits = forced_logits(runner_of(case, name, dtype, Fetching), case, chunk)
    if dtype is torch.float32:
        check_float32(logits, case)
        return
    expected = case.tensors["greedy_logits"]
    assert max_difference(logits, expected) < 1.5 * BFLOAT16_DIFFERENCE[case.name]
    best = np.sort(expected, 1)
    clear = best[:, -1] - best[:, -2] > 0.5
    assert clear.any() and (logits.argmax(1) == expected.argmax(1))[clear].all()


@pytest.mark.parametrize(("name", "dtype"), SETTINGS)
@pytest.mark.parametrize("num_seqs", [1, 2, 3, 8, 11, 20])
def test_a_graph_computes_what_an_eager_step_does(
    case: GoldenCase, name: str, dtype: torch.dtype, num_seqs: int
) -> None:
    runner = runner_of(case, name, dtype)
    assert runner._graphs is not None and runner._backend is not None
    runner._kv_cache.normal_()
    plan = plan_of([1] * num_seqs, 3 * runner._block_size - 5, runner._block_size)
    assert plan.block_tables.max() < NUM_BLOCKS
    assert runner._graphs.covers(plan)
    with torch.inference_mode():
        eager = runner._execute_paged(runner._backend, plan, []).cpu().numpy()
    for _ in range(2):
        found = runner.execute(plan, []).cpu().numpy()
        assert max_difference(found, eager) < 0.02 * np.abs(eager).max()


@pytest.mark.parametrize(("name", "dtype"), SETTINGS)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_device(case: GoldenCase, name: str, dtype: torch.dtype) -> None:
    """FlashInfer's host waits for the copy of its last plan, which is an event and not counted."""
    runner = runner_of(case, name, dtype)
    plans = [plan_of(lens, 300, runner._block_size) for lens in ([1] * 3, [100], [1, 50, 1])]
    for plan in plans:
        runner.execute(plan, [])
    with nothing_waits_for_the_device():
        for plan in plans:
            runner.execute(plan, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_is_chosen_and_named_ones_are_taken(case: GoldenCase, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    for name in ("auto", "triton"):
        settings = LlmSettings(attention=name)
        chosen = choose_attention(settings, checkpoint, Device(CUDA), dtype, Shard())
        assert chosen.backend is not None and chosen.block_size == chosen.backend.block_size
