"""Executes step plans: one forward pass over a mixed batch, with the paged KV cache."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.lora import LoraFiles
from common.sizing import Footprint
from services.llm import families
from services.llm.attention import GatheredAttention, StepAttention
from services.llm.batch import arrays_of, batch_of
from services.llm.decoder import Decoder, LayerPairs
from services.llm.fused_decode import FusedDecode
from services.llm.loading import RankBounds
from services.llm.lora_weights import read_layers
from services.llm.parallel import Shard
from services.llm.step_plan import StepPlan


class ModelRunner:
    """A rank's weights and KV cache. It knows no requests: the plan says everything."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        report_loading: Callable[[float], None] = lambda fraction: None,
        shard: Shard = Shard(),
        quantization: str = "auto",
    ) -> None:
        self._model_type = checkpoint.family.model_type
        self._model = families.load(checkpoint, dtype, device, shard, report_loading, quantization)
        self._block_size = block_size
        shape = self._model.kv_cache_shape(num_blocks, block_size)
        self._kv_cache = torch.zeros(shape, dtype=dtype, device=device)
        self._fused_decode = FusedDecode.of(self._model, self._kv_cache)

    @staticmethod
    def kv_bytes_per_block(
        checkpoint: Checkpoint, dtype: torch.dtype, block_size: int, world_size: int = 1
    ) -> int:
        """Return the bytes of one rank's KV cache for each block."""
        return block_size * Footprint(checkpoint, dtype.itemsize).kv_bytes_per_token(world_size)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def num_bytes_read(self) -> int:
        """The bytes of the checkpoint's weights that this rank has read."""
        return self._model.num_bytes_read

    @property
    def input_width(self) -> int:
        """The width of the embeddings that `execute` takes."""
        return self._model.input_width

    @torch.inference_mode()
    def prepare_adapter(self, files: LoraFiles) -> list[LayerPairs]:
        """Return this rank's share of an adapter. Any thread may call this.

        Raises
        ------
        BadCheckpoint
            if a value is not finite in the dtype of the model.
        """
        model = self._model
        assert isinstance(model, Decoder)
        targets = families.LORA_TARGETS[self._model_type](RankBounds(model.sizes, model.shard))
        return read_layers(files, targets, len(model.layers), model.dtype, model.device)

    def use_adapter(self, adapter: int, layers: list[LayerPairs]) -> None:
        """Let steps name an adapter from now on."""
        assert isinstance(self._model, Decoder)
        self._model.adapters[adapter] = layers

    def drop_adapter(self, adapter: int) -> None:
        """Free an adapter that no further step names, if it is there."""
        if isinstance(self._model, Decoder):
            self._model.adapters.pop(adapter, None)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        """Run one step and return float32 logits [num_sampled, vocab_size].

        `embeddings` are [n, input_width] each, of any dtype and device. Together they have a row
        for each of `plan.item_rows`.
        """
        check_embeddings(plan, embeddings)
        self._copy_blocks(plan)
        model = self._model
        tensors = {name: self._tensor(array) for name, array in arrays_of(plan).items()}
        x = model.embed(tensors["token_ids"])
        if embeddings:
            x[tensors["item_rows"]] = torch.cat([e.to(x.device, x.dtype) for e in embeddings])
        self._clear_fresh_blocks(plan)
        if self._fused_decode is not None and self._fused_decode.takes(plan):
            return self._fused_decode.run(plan, x, batch_of(tensors, attention=None))
        return model.forward(x, batch_of(tensors, self._attention(plan)), self._kv_cache)

    def _attention(self, plan: StepPlan) -> StepAttention:
        return GatheredAttention(plan, self._block_size, self._model.dtype, self._model.device)

    def _copy_blocks(self, plan: StepPlan) -> None:
        """Copy blocks that one sequence has filled in part and several go on from."""
        if len(plan.block_copies):
            sources, targets = self._tensor(plan.block_copies.T)
            self._kv_cache[:, :, targets] = self._kv_cache[:, :, sources]

    def _clear_fresh_blocks(self, plan: StepPlan) -> None:
        """Clear blocks that a sequence begins and does not fill.

        They still hold keys and values of their former owner. These are masked, but a NaN among
        them would reach the new owner through a product with zero.
        """
        used = plan.context_lens % self._block_size
        begun = (used > 0) & (plan.query_lens >= used)
        if begun.any():
            last_slots = plan.slot_mapping[plan.query_lens.cumsum() - 1]
            self._kv_cache[:, :, self._tensor(last_slots[begun] // self._block_size)] = 0

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self._model.device)


def check_embeddings(plan: StepPlan, embeddings: list[Tensor]) -> None:
    num_given = sum(map(len, embeddings))
    assert num_given == len(plan.item_rows), "as many embeddings as placeholder rows"
