"""Executes step plans on CUDA: decodes as graphs, mixed steps with paged attention.

In float32 it does what the plain runner does. Nothing here waits for the device. Untried: no CUDA
device was at hand when this was written.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.logs import get_logger
from services.llm.batch import arrays_of, batch_of
from services.llm.cuda_attention import PagedAttention, objection_to_pages, parts_of
from services.llm.decode_graphs import DecodeGraphs, captured_sizes
from services.llm.model_runner import ModelRunner, check_embeddings
from services.llm.packing import upload, upload_tensor
from services.llm.parallel import Shard
from services.llm.step_plan import StepPlan


class CudaModelRunner(ModelRunner):
    """A rank's weights and KV cache on a CUDA card."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        report_loading: Callable[[float], None] = lambda fraction: None,
        shard: Shard = Shard(),
        max_num_seqs: int = 64,
        quantization: str = "auto",
    ) -> None:
        # One block more than the scheduler knows. Rows that fill up a captured batch write there.
        super().__init__(
            checkpoint,
            dtype,
            device,
            num_blocks + 1,
            block_size,
            report_loading,
            shard,
            quantization,
        )
        self._graphs: DecodeGraphs | None = None
        if objection := objection_to_pages(dtype, checkpoint.sizes.head_dim, block_size, device):
            get_logger().warning(
                "attention gathers its blocks, and decodes are not captured as graphs",
                reason=objection,
            )
            return
        max_context = min(checkpoint.max_model_len, num_blocks * block_size)
        self._graphs = DecodeGraphs(
            self._model,
            self._kv_cache,
            num_blocks,
            max_context,
            checkpoint.family.num_position_components,
            captured_sizes(max_num_seqs),
            report_loading,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        if self._graphs is None:
            return super().execute(plan, embeddings)
        self._copy_blocks(plan)
        if self._graphs.covers(plan):
            return self._graphs.run(plan)
        return self._execute_paged(plan, embeddings)

    def _execute_paged(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        """Run a mixed step.

        What a block's former owner left needs no clearing: the kernel loads nothing beyond the end
        of a sequence.
        """
        check_embeddings(plan, embeddings)
        model = self._model
        parts = list(parts_of(plan))
        own = arrays_of(plan)
        of_parts = [array for part in parts for array in part.arrays]
        uploaded = upload([plan.slot_mapping, *own.values(), *of_parts], model.device)
        slots = uploaded[0]
        tensors = dict(zip(own, uploaded[1:], strict=False))
        x = model.embed(tensors["token_ids"])
        if embeddings:
            x[tensors["item_rows"]] = torch.cat(
                [upload_tensor(e, model.device).to(x.dtype) for e in embeddings]
            )
        attention = PagedAttention.of(slots, parts, uploaded[1 + len(own) :])
        return model.forward(x, batch_of(tensors, attention), self._kv_cache)
