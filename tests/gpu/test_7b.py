"""A model of the 7B's shapes and random weights: it fits, it computes numbers, and what it reaches
is printed.

python -m pytest -s tests/gpu/test_7b.py
"""

import shutil
from pathlib import Path

import pytest
import torch

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
from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.choice import shapes_of
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.parallel import Shard
from tests.gpu import CUDA, backend_for, needs_cuda

pytestmark = [*needs_cuda, pytest.mark.timeout(1800)]
WEIGHT_BYTES = 17 * 10**9
LARGEST_BLOCK = max(kind.block_size for kind in BACKENDS.values())
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


@pytest.mark.parametrize("name", BACKENDS)
def test_decodes_and_a_prompt_are_numbers(checkpoint: Checkpoint, name: str) -> None:
    block_size = BACKENDS[name].block_size
    backend = backend_for(name, shapes_of(checkpoint.sizes, Shard(), DTYPE, block_size))
    num_blocks = 4 * -(-600 // block_size)
    runner = CudaModelRunner(
        checkpoint, DTYPE, CUDA, num_blocks, block_size, max_num_seqs=4, attention=backend
    )
    assert runner.execute(plan_of([600], 600, block_size), []).isfinite().all()
    assert runner.execute(plan_of([1] * 4, 600, block_size), []).isfinite().all()


def test_memory_is_that_of_weights_and_cache_and_the_speed_is_printed(
    checkpoint: Checkpoint,
) -> None:
    limits = measure_limits(CUDA)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rows = of_language(checkpoint, CUDA, limits)
    memory = torch.cuda.max_memory_allocated()
    most_tokens = max(DECODE_BATCHES) * (DECODE_CONTEXT + 2 * LARGEST_BLOCK)
    cache = CudaModelRunner.kv_bytes_per_block(checkpoint, DTYPE, most_tokens)
    assert memory < WEIGHT_BYTES + cache + SCRATCH_BYTES
    report(limits, rows + of_vision(checkpoint, CUDA, limits), torch.cuda.get_device_name(), memory)
