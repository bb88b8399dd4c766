"""The device, dtype and models that a part measures, or their stand-ins in a dry run."""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import made
from benchmarks.gpu.part import Task
from common.checkpoint import Checkpoint, open_checkpoint
from services.llm import families
from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.choice import shapes_of
from services.llm.attention_backends.protocol import PagedBackend, Shapes
from services.llm.cuda_model_runner import CudaModelRunner
from services.llm.language_model import LanguageModel
from services.llm.parallel import Shard

EXTRA_TOKENS = 1024
"""The tokens that each sequence may grow by."""


class Setup:
    """Lasts for a with block. In a dry run, code for CUDA then runs on the CPU, with stand-ins."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._exits = ExitStack()
        self._models: dict[str, LanguageModel] = {}
        self._load = families.load
        self.device = torch.device(task.sizes.device)
        self.dtype: torch.dtype = getattr(torch, task.sizes.dtype)

    def __enter__(self) -> "Setup":
        if self._task.dry_run:
            # Not imported on a card, where pytest may be missing.
            import pytest

            from tests.llm.cuda_on_cpu import ReplayedPool, pretend

            patch = self._exits.enter_context(pytest.MonkeyPatch.context())
            pretend(patch)
            for module in ("graphed_tower", "attention_choice"):
                patch.setattr(f"services.vision.{module}.GraphPool", ReplayedPool)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def checkpoint(self, quantized: str = "") -> Checkpoint:
        """Return the random checkpoint of the sizes, which is made first if it is missing.

        `quantized` is the format of its weights, such as "fp8"; empty for bfloat16.
        """
        name = "-".join(filter(None, (self._task.sizes.checkpoint, quantized)))
        return open_checkpoint(made.make(name, self._task.folder, self.device))

    def shapes(self, checkpoint: Checkpoint, kind: type[PagedBackend]) -> Shapes:
        return shapes_of(checkpoint.sizes, Shard(), self.dtype, kind.block_size)

    def backends(self, checkpoint: Checkpoint) -> list[type[PagedBackend]]:
        """Return the backends of attention that object to nothing, the fastest measured first."""
        kinds = [
            kind
            for kind in BACKENDS.values()
            if self._task.dry_run or not kind.objection(self.shapes(checkpoint, kind), self.device)
        ]
        rows = [row for row in self._task.rows_of("speed") if row.get("weights") == "bfloat16"]
        seconds = {row["attention"]: row["ms"] for row in rows if row["case"].startswith("decode")}
        return sorted(kinds, key=lambda kind: seconds.get(kind.name, float("inf")))

    def num_blocks(self, block_size: int) -> int:
        """Return the blocks that all measured steps fit into."""
        sizes = self._task.sizes
        batch = max(sizes.decodes)
        tokens = max(batch * (sizes.decode_context + EXTRA_TOKENS), *sizes.prefills)
        return -(-tokens // block_size) + batch

    def runner(self, checkpoint: Checkpoint, kind: type[PagedBackend]) -> CudaModelRunner:
        """Return a runner. Those of one checkpoint share its weights, which are loaded once."""
        with mock.patch.object(families, "load", self._load_once):
            return CudaModelRunner(
                checkpoint,
                self.dtype,
                self.device,
                self.num_blocks(kind.block_size),
                kind.block_size,
                max_num_seqs=max(self._task.sizes.decodes),
                attention=kind,
            )

    def _load_once(self, checkpoint: Checkpoint, *given: Any) -> LanguageModel:
        if checkpoint.name not in self._models:
            self._models.clear()
            self._models[checkpoint.name] = self._load(checkpoint, *given)
        return self._models[checkpoint.name]
