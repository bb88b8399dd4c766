"""Executes step plans on CUDA: decodes as graphs, mixed steps with paged attention, float32 as
everywhere.

Nothing here waits for the device. Untried: no CUDA device was at hand when it was written.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.logs import get_logger
from services.llm.cuda_attention import PagedAttention, objection_to_pages, parts_of
from services.llm.decode_graphs import DecodeGraphs, captured_sizes
from services.llm.model_runner import ModelRunner
from services.llm.packing import upload, upload_tensor
from services.llm.parallel import Shard
from services.llm.step_plan import StepPlan


class CudaModelRunner(ModelRunner):
    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        progress: Callable[[float], None] = lambda fraction: None,
        shard: Shard = Shard(),
        max_num_seqs: int = 64,
    ) -> None:
        # One block more than the scheduler knows: the rows that fill up a captured batch write
        # there.
        super().__init__(checkpoint, dtype, device, num_blocks + 1, block_size, progress, shard)
        self._graphs: DecodeGraphs | None = None
        if objection := objection_to_pages(dtype, self._model.config.head_dim, block_size, device):
            get_logger().warning(
                "attention gathers its blocks, and decodes are no graphs", reason=objection
            )
            return
        max_context = min(checkpoint.max_model_len, num_blocks * block_size)
        self._graphs = DecodeGraphs(
            self._model,
            self._kv_cache,
            num_blocks,
            max_context,
            captured_sizes(max_num_seqs),
            progress,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        if self._graphs is None:
            return super().execute(plan, embeddings)
        if self._graphs.covers(plan):
            return self._graphs.run(plan)
        return self._execute_paged(plan, embeddings)

    def _execute_paged(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        """What a block's former owner left needs no clearing: the kernel loads nothing beyond a
        sequence's end."""
        assert sum(map(len, embeddings)) == len(plan.embedding_rows), (
            "as many embeddings as placeholder rows"
        )
        model = self._model
        parts = list(parts_of(plan))
        own = [
            plan.token_ids,
            plan.positions,
            plan.slot_mapping,
            plan.embedding_rows,
            plan.sampled_rows,
        ]
        uploaded = upload(own + [array for part in parts for array in part.arrays], model.device)
        token_ids, positions, slots, embedding_rows, sampled_rows, *of_parts = uploaded
        x = model.embed(token_ids)
        if embeddings:
            x[embedding_rows] = torch.cat(
                [upload_tensor(e, model.device).to(x.dtype) for e in embeddings]
            )
        return model.forward(
            x, positions, PagedAttention.of(slots, parts, of_parts), self._kv_cache, sampled_rows
        )
