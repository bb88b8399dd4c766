"""Executes step plans: one forward pass of the language model over a mixed batch, with the paged KV
cache."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.sizing import Sizes
from services.llm.attention import GatheredAttention
from services.llm.families.qwen2_5_vl import LanguageModel
from services.llm.fused_decode import FusedDecode
from services.llm.parallel import Shard
from services.llm.step_plan import StepPlan


class ModelRunner:
    """A rank's weights and KV cache. It knows nothing of requests: the plan says it all."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        progress: Callable[[float], None] = lambda fraction: None,
        shard: Shard = Shard(),
        quantization: str = "none",
    ) -> None:
        self._model = LanguageModel(checkpoint, dtype, device, shard, progress, quantization)
        config = self._model.config
        self._block_size = block_size
        shape = (
            config.num_layers,
            2,
            num_blocks,
            block_size,
            self._model.num_local_kv_heads,
            config.head_dim,
        )
        self._kv_cache = torch.zeros(shape, dtype=dtype, device=device)
        self._fused_decode = FusedDecode.of(self._model, self._kv_cache)

    @staticmethod
    def kv_bytes_per_block(
        checkpoint: Checkpoint, dtype: torch.dtype, block_size: int, world_size: int = 1
    ) -> int:
        """Bytes of one rank's KV cache for each block."""
        return block_size * Sizes(checkpoint, dtype.itemsize).kv_bytes_per_token(world_size)

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def num_bytes_read(self) -> int:
        """Of the checkpoint's weights, by this rank."""
        return self._model.num_bytes_read

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings that `execute` takes."""
        return self._model.config.hidden_size

    @torch.inference_mode()
    def execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        """Run one step; returns float32 logits [num_sampled, vocab_size].

        `embeddings` are [n, hidden_size] each, of any dtype and device; together they have a row
        for each of `plan.embedding_rows`.
        """
        model = self._model
        assert sum(map(len, embeddings)) == len(plan.embedding_rows), (
            "as many embeddings as placeholder rows"
        )
        x = model.embed(self._tensor(plan.token_ids))
        if embeddings:
            x[self._tensor(plan.embedding_rows)] = torch.cat(
                [e.to(x.device, x.dtype) for e in embeddings]
            )
        self._clear_fresh_blocks(plan)
        positions = self._tensor(plan.positions)
        if self._fused_decode is not None and self._fused_decode.takes(plan):
            return self._fused_decode.run(plan, x, positions)
        attention = GatheredAttention(plan, self._block_size, model.dtype, model.device)
        return model.forward(
            x, positions, attention, self._kv_cache, self._tensor(plan.sampled_rows)
        )

    def _clear_fresh_blocks(self, plan: StepPlan) -> None:
        """A block that a sequence begins and does not fill still holds its former owner's keys and
        values.

        They are masked, but a NaN among them would reach the newcomer through a product with zero.
        """
        used = plan.context_lens % self._block_size
        begun = (used > 0) & (plan.query_lens >= used)
        if begun.any():
            last_slots = plan.slot_mapping[plan.query_lens.cumsum() - 1]
            self._kv_cache[:, :, self._tensor(last_slots[begun] // self._block_size)] = 0

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self._model.device)
