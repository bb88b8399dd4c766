"""The CUDA model runner's logic on the CPU: graphs and paged attention are stand-ins, batches are
padded as on CUDA."""

import itertools

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.by_varlen import ByVarlen
from services.llm.attention_backends.protocol import PagedBackend, PlannedAttention
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.decode_graphs import captured_sizes
from services.llm.model_runner import ModelRunner
from services.llm.step_plan import StepPlan
from tests.golden import GoldenCase, max_difference
from tests.llm.cuda_on_cpu import CPU, pretend
from tests.llm.test_model_runner import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    NUM_STEPS,
    Sequence,
    blocks_of,
    case,
    forced_logits,
    runner_of,
    step,
)

__all__ = ["case"]


@pytest.fixture(params=["varlen", "flashinfer"])
def backend(request: pytest.FixtureRequest) -> type[PagedBackend]:
    return BACKENDS[request.param]


@pytest.fixture
def runner(
    case: GoldenCase, backend: type[PagedBackend], monkeypatch: pytest.MonkeyPatch
) -> CudaModelRunner:
    pretend(monkeypatch)
    return cuda_runner_of(case, backend)


def cuda_runner_of(
    case: GoldenCase, backend: type[PagedBackend] | None, max_num_seqs: int = 5
) -> CudaModelRunner:
    return CudaModelRunner(
        open_checkpoint(case.checkpoint),
        torch.float32,
        CPU,
        NUM_BLOCKS,
        BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        attention=backend,
    )


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 64, 100, 256])
def test_every_batch_finds_a_graph_that_is_little_larger(max_num_seqs: int) -> None:
    sizes = captured_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for count in range(1, max_num_seqs + 1):
        assert next(size for size in sizes if size >= count) < 2 * count


@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_equal_the_reference(runner: CudaModelRunner, case: GoldenCase, chunk: int) -> None:
    logits = forced_logits(runner, case, chunk)
    assert max_difference(logits, case.tensors["greedy_logits"]) < 1e-3


def test_sequences_that_come_and_go_share_graphs(runner: CudaModelRunner, case: GoldenCase) -> None:
    sequences = [Sequence(case, blocks) for blocks in blocks_of(4)]
    greedy_ids = {id(s): [] for s in sequences}
    num_seqs = set()
    for i in itertools.count():
        work = [
            (s, min(s.num_left, 50))
            for begin, s in zip((0, 1, 4, 9), sequences, strict=True)
            if i >= begin
        ]
        work = [(s, count) for s, count in work if len(greedy_ids[id(s)]) < NUM_STEPS]
        if not work:
            break
        num_seqs.add(len(work))
        finished = [s for s, count in work if count == s.num_left]
        for s, row in zip(finished, step(runner, work), strict=True):
            greedy_ids[id(s)].append(int(row.argmax()))
            s.append(greedy_ids[id(s)][-1])
    assert num_seqs == {1, 2, 3, 4}
    assert list(greedy_ids.values()) == [case.expected["greedy_ids"]] * 4


def test_what_fills_up_a_batch_writes_to_the_scratch_block_alone(
    runner: CudaModelRunner, case: GoldenCase
) -> None:
    sequences = [Sequence(case, blocks) for blocks in blocks_of(3)]
    step(runner, [(s, s.num_left) for s in sequences])
    runner._kv_cache[:, :, NUM_BLOCKS] = 7
    before = runner._kv_cache.clone()
    slots = []
    for s in sequences:
        s.append(5)
        slots.append(
            s.blocks[s.num_computed // BLOCK_SIZE] * BLOCK_SIZE + s.num_computed % BLOCK_SIZE
        )
    step(runner, [(s, 1) for s in sequences])
    changed = (runner._kv_cache != before).any(0).any(0).any(-1).any(-1).flatten()
    assert sorted(changed.nonzero()[:, 0].tolist()) == sorted([*slots, NUM_BLOCKS * BLOCK_SIZE])


def test_eager_steps_warm_up_in_the_scratch_block_alone(
    case: GoldenCase, backend: type[PagedBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    events: list[tuple[int, ...] | float] = []
    of_plan = backend.of_plan

    def watched(self: PagedBackend, plan: StepPlan) -> PlannedAttention:
        assert (plan.block_tables == NUM_BLOCKS).all()
        events.append(tuple(plan.query_lens))
        return of_plan(self, plan)

    monkeypatch.setattr(backend, "of_plan", watched)
    runner = CudaModelRunner(
        open_checkpoint(case.checkpoint),
        torch.float32,
        CPU,
        NUM_BLOCKS,
        BLOCK_SIZE,
        events.append,
        max_num_seqs=2,
        attention=backend,
    )
    steps = [event for event in events if isinstance(event, tuple)]
    assert any(1 in step and max(step) > 1 for step in steps), "a mixed step"
    assert min(map(sum, steps)) <= 8 and max(map(sum, steps)) > 256
    assert events[-2 * len(steps) :] == [event for step in steps for event in (step, 1.0)]
    written = runner._kv_cache.ne(0).flatten(3).any(-1).any(1)
    assert not written[:, :NUM_BLOCKS].any()
    assert runner._kv_cache[:, :, NUM_BLOCKS].flatten(3).ne(0).any(-1).all(), "each slot"
    assert runner._kv_cache.isfinite().all()


def test_a_sequence_that_samples_nothing_has_no_row(
    runner: CudaModelRunner, case: GoldenCase
) -> None:
    """The last but one token of a prompt comes alone: a decode in all but its logits."""
    expected, found = (step_of_two(r, case) for r in (runner_of(case), runner))
    assert len(found) == 1 and max_difference(found, expected) < 1e-3


def step_of_two(runner: ModelRunner, case: GoldenCase) -> np.ndarray:
    own, other = (Sequence(case, blocks) for blocks in blocks_of(2))
    step(runner, [(own, own.num_left - 2), (other, other.num_left - 1)])
    return step(runner, [(own, 1), (other, 1)])


def test_logits_outlive_the_next_step(runner: CudaModelRunner, case: GoldenCase) -> None:
    sequence = Sequence(case, blocks_of(1)[0])
    step(runner, [(sequence, sequence.num_left)])
    sequence.append(5)
    first = step(runner, [(sequence, 1)])
    kept = first.copy()
    sequence.append(6)
    step(runner, [(sequence, 1)])
    assert (first == kept).all()


def test_only_decodes_of_a_captured_size_are_graphs(
    case: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    runner = cuda_runner_of(case, ByVarlen, max_num_seqs=3)
    assert runner._graphs is not None
    replayed = []
    run = runner._graphs.run
    monkeypatch.setattr(
        runner._graphs, "run", lambda plan: (replayed.append(len(plan.query_lens)), run(plan))[1]
    )
    sequences = [Sequence(case, blocks) for blocks in blocks_of(4)]
    step(runner, [(s, s.num_left) for s in sequences])
    for count in (4, 3, 2):
        for s in sequences[:count]:
            s.append(5)
        step(runner, [(s, 1) for s in sequences[:count]])
    assert replayed == [3, 2]


def test_without_a_backend_steps_run_as_elsewhere(case: GoldenCase) -> None:
    runner = cuda_runner_of(case, None)
    assert runner._graphs is None
    assert max_difference(forced_logits(runner, case, 33), case.tensors["greedy_logits"]) < 1e-3
