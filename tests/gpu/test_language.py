"""The language model on CUDA equals the reference, eagerly and by graphs."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from benchmarks.gpu import plan_of
from common.checkpoint import open_checkpoint
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.step_plan import StepPlan
from tests.golden import CASES, GoldenCase, max_difference
from tests.gpu import CUDA, needs_cuda
from tests.llm import test_model_runner
from tests.llm.test_model_runner import BFLOAT16_DIFFERENCE, BLOCK_SIZE, NUM_BLOCKS, forced_logits

pytestmark = needs_cuda
PAGE = 256
MAX_NUM_SEQS = 20


class Fetching(CudaModelRunner):
    """Its logits come to the host."""

    def execute(self, plan: StepPlan, embeddings: list[torch.Tensor]) -> torch.Tensor:
        return super().execute(plan, embeddings).cpu()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


def paged_runner(
    case: GoldenCase, kind: type[CudaModelRunner] = CudaModelRunner
) -> CudaModelRunner:
    checkpoint = open_checkpoint(case.checkpoint)
    runner = kind(checkpoint, torch.bfloat16, CUDA, NUM_BLOCKS, PAGE, max_num_seqs=MAX_NUM_SEQS)
    assert runner._graphs is not None
    return runner


@contextmanager
def nothing_waits_for_the_device() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("chunk", [1000, 7])
def test_float32_logits_equal_the_reference(case: GoldenCase, chunk: int) -> None:
    runner = Fetching(open_checkpoint(case.checkpoint), torch.float32, CUDA, NUM_BLOCKS, BLOCK_SIZE)
    logits = forced_logits(runner, case, chunk)
    assert max_difference(logits, case.tensors["greedy_logits"]) < 1e-3
    assert logits.argmax(1).tolist() == case.expected["greedy_ids"]


@pytest.mark.parametrize("chunk", [1000, 16])
def test_bfloat16_is_as_near_to_float32_as_the_reference_is(
    case: GoldenCase, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_model_runner, "BLOCK_SIZE", PAGE)
    logits = forced_logits(paged_runner(case, Fetching), case, chunk)
    expected = case.tensors["greedy_logits"]
    assert max_difference(logits, expected) < 1.5 * BFLOAT16_DIFFERENCE[case.name]
    best = np.sort(expected, 1)
    clear = best[:, -1] - best[:, -2] > 0.5
    assert clear.any() and (logits.argmax(1) == expected.argmax(1))[clear].all()


@pytest.mark.parametrize("num_seqs", [1, 2, 3, 8, 11, 20])
def test_a_graph_computes_what_an_eager_step_does(case: GoldenCase, num_seqs: int) -> None:
    runner = paged_runner(case)
    assert runner._graphs is not None
    runner._kv_cache.normal_()
    plan = plan_of([1] * num_seqs, 700, PAGE)
    assert runner._graphs.covers(plan)
    with torch.inference_mode():
        eager = runner._execute_paged(plan, []).cpu().numpy()
    for _ in range(2):
        found = runner.execute(plan, []).cpu().numpy()
        assert max_difference(found, eager) < 0.02 * np.abs(eager).max()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_device(case: GoldenCase) -> None:
    runner = paged_runner(case)
    plans = [plan_of([1] * 3, 300, PAGE), plan_of([100], 300, PAGE), plan_of([1, 50, 1], 300, PAGE)]
    for plan in plans:
        runner.execute(plan, [])
    with nothing_waits_for_the_device():
        for plan in plans:
            runner.execute(plan, [])
