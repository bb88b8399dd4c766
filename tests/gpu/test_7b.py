"""A model of the 7B's shapes and random weights: it fits, it computes numbers, and what it reaches
is printed.

python -m pytest -s tests/gpu/test_7b.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from services.llm.cuda_attention import PAGE_TOKENS

from benchmarks import checkpoints
from benchmarks.gpu import (
    DECODE_BATCHES,
    DECODE_CONTEXT,
    DTYPE,
    measure_limits,
    of_language,
    of_vision,
    plan_of,
    report,
)
from common.checkpoint import Checkpoint, open_checkpoint
from services.llm.cuda_model_runner import CudaModelRunner
from tests.gpu import CUDA, needs_cuda

pytestmark = [*needs_cuda, pytest.mark.timeout(1800)]
WEIGHT_BYTES = 17 * 10**9
SCRATCH_BYTES = 4 * 10**9
"""For activations, graphs, and what is joined while weights load."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("7b")
    if (
        shutil.disk_usage(folder).free < 2 * WEIGHT_BYTES
        or torch.cuda.mem_get_info()[0] < 2 * WEIGHT_BYTES
    ):
        pytest.skip("not twice the weights' room on disk and device")
    return open_checkpoint(checkpoints.make("7b", folder))


def test_decodes_and_a_prompt_are_numbers(checkpoint: Checkpoint) -> None:
    runner = CudaModelRunner(checkpoint, DTYPE, CUDA, 16, PAGE_TOKENS, max_num_seqs=4)
    assert runner.execute(plan_of([600], 600, PAGE_TOKENS), []).isfinite().all()
    assert runner.execute(plan_of([1] * 4, 600, PAGE_TOKENS), []).isfinite().all()


def test_memory_is_that_of_weights_and_cache_and_the_speed_is_printed(
    checkpoint: Checkpoint,
) -> None:
    limits = measure_limits(CUDA)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rows = of_language(checkpoint, CUDA, limits)
    memory = torch.cuda.max_memory_allocated()
    num_blocks = 1 + max(DECODE_BATCHES) * -(-DECODE_CONTEXT // PAGE_TOKENS)
    cache = num_blocks * CudaModelRunner.kv_bytes_per_block(checkpoint, DTYPE, PAGE_TOKENS)
    assert memory < WEIGHT_BYTES + cache + SCRATCH_BYTES
    report(limits, rows + of_vision(checkpoint, CUDA, limits), torch.cuda.get_device_name(), memory)
