"""The device, dtype and checkpoint that a part measures, or their stand-ins in a dry run."""

from contextlib import ExitStack

import torch

from benchmarks.gpu import made
from benchmarks.gpu.part import Task
from common.checkpoint import Checkpoint, open_checkpoint
from services.llm.cuda_attention import PAGE_TOKENS
from services.llm.cuda_model_runner import CudaModelRunner

DRY_BLOCK_SIZE = 16
EXTRA_TOKENS = 1024
"""The tokens that each sequence may grow by."""


class Setup:
    """Lasts for a with block. In a dry run, code for CUDA then runs on the CPU, with stand-ins."""

    def __init__(self, task: Task) -> None:
        sizes = task.sizes
        self._task = task
        self._exits = ExitStack()
        self.device = torch.device(sizes.device)
        self.dtype: torch.dtype = getattr(torch, sizes.dtype)
        self.block_size = DRY_BLOCK_SIZE if task.dry_run else PAGE_TOKENS
        batch = max(sizes.decodes)
        tokens = max(batch * (sizes.decode_context + EXTRA_TOKENS), *sizes.prefills)
        self.num_blocks = -(-tokens // self.block_size) + batch

    def __enter__(self) -> "Setup":
        if self._task.dry_run:
            # Not imported on a card, where pytest may be missing.
            import pytest

            from tests.llm.cuda_on_cpu import ReplayedPool, pretend

            monkeypatch = pytest.MonkeyPatch()
            self._exits.callback(monkeypatch.undo)
            pretend(monkeypatch)
            monkeypatch.setattr("services.vision.graphed_tower.GraphPool", ReplayedPool)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def checkpoint(self) -> Checkpoint:
        """Return the random checkpoint of the sizes, which is made first if it is missing."""
        return open_checkpoint(
            made.make(self._task.sizes.checkpoint, self._task.folder, self.device)
        )

    def runner(self, checkpoint: Checkpoint) -> CudaModelRunner:
        return CudaModelRunner(
            checkpoint,
            self.dtype,
            self.device,
            self.num_blocks,
            self.block_size,
            max_num_seqs=max(self._task.sizes.decodes),
        )
