"""Executes step plans of whole prompts, for models that compute one vector of each prompt."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from services.llm import families
from services.llm.parallel import Shard
from services.llm.pooling_model import PooledInput
from services.llm.step_plan import StepPlan


class PoolingRunner:
    """A rank's weights. It keeps nothing between steps."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        report_loading: Callable[[float], None] = lambda fraction: None,
        shard: Shard = Shard(),
    ) -> None:
        self._model = families.load_pooling(checkpoint, dtype, device, shard, report_loading)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def num_bytes_read(self) -> int:
        """The bytes of the checkpoint's weights that this rank has read."""
        return self._model.num_bytes_read

    @property
    def input_width(self) -> int:
        """The width of the items that `execute` takes: the values of a patch."""
        return self._model.values_per_patch

    @torch.inference_mode()
    def execute(self, plan: StepPlan, items: list[Tensor]) -> Tensor:
        """Run one step and return float32 [num_seqs, n].

        Each sequence is a whole prompt. `items` are uint8 [num_patches, values per patch], one for
        each sequence with rows of items.
        """
        device = self._model.device
        rest = iter(items)
        inputs = []
        ends = plan.query_lens.cumsum()
        num_item_rows = np.diff(np.searchsorted(plan.item_rows, ends), prepend=0)
        token_ids = torch.tensor(plan.token_ids, device=device).split(plan.query_lens.tolist())
        for ids, num_rows in zip(token_ids, num_item_rows, strict=True):
            inputs.append(PooledInput(ids, next(rest).to(device) if num_rows else None))
        assert next(rest, None) is None, "one item for each sequence with rows of items"
        return self._model.pool(inputs)
