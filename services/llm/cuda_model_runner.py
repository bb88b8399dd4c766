"""Executes step plans on CUDA: decodes as graphs, mixed steps by the same backend of attention.

Without a backend it does what the plain runner does. Untried: no CUDA device was at hand when this
was written.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from services.llm import warm_up
from services.llm.attention_backends.choice import shapes_of
from services.llm.attention_backends.protocol import PagedAttention, PagedBackend
from services.llm.batch import arrays_of, batch_of
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
        *,
        attention: type[PagedBackend] | None,
    ) -> None:
        """`attention` computes over the blocks where they lie; None gathers them."""
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
        self._backend: PagedBackend | None = None
        self._graphs: DecodeGraphs | None = None
        if attention is None:
            return
        shapes = shapes_of(checkpoint.sizes, shard, dtype, block_size)
        self._backend = attention(shapes, device)
        max_context = min(checkpoint.max_model_len, num_blocks * block_size)
        num_components = checkpoint.family.num_position_components
        self._graphs = DecodeGraphs(
            self._model,
            self._backend,
            self._kv_cache,
            num_blocks,
            max_context,
            num_components,
            captured_sizes(max_num_seqs),
            report_loading,
        )
        with torch.inference_mode():
            for plan in warm_up.plans(num_blocks, block_size, num_components):
                self._execute_paged(self._backend, plan, [])
                report_loading(1.0)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        if self._backend is None or self._graphs is None:
            return super().execute(plan, embeddings)
        self._copy_blocks(plan)
        if self._graphs.covers(plan):
            return self._graphs.run(plan)
        return self._execute_paged(self._backend, plan, embeddings)

    def _execute_paged(
        self, backend: PagedBackend, plan: StepPlan, embeddings: list[Tensor]
    ) -> Tensor:
        """Run a mixed step.

        What a block's former owner left needs no clearing: no backend loads anything beyond the end
        of a sequence.
        """
        check_embeddings(plan, embeddings)
        model = self._model
        planned = backend.of_plan(plan)
        own = arrays_of(plan)
        uploaded = upload([plan.slot_mapping, *own.values(), *planned.arrays], model.device)
        slots = uploaded[0]
        tensors = dict(zip(own, uploaded[1:], strict=False))
        x = model.embed(tensors["token_ids"])
        if embeddings:
            x[tensors["item_rows"]] = torch.cat(
                [upload_tensor(e, model.device).to(x.dtype) for e in embeddings]
            )
        attend = planned.bind([array.int() for array in uploaded[1 + len(own) :]])
        batch = batch_of(tensors, PagedAttention(slots, attend))
        return model.forward(x, batch, self._kv_cache)
