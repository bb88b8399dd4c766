"""Executes step plans on an Ascend NPU, whose attention reads the paged KV cache in place.

Untried: no NPU was at hand when this was written.
"""

from typing import Any

import torch
from torch import Tensor

from common.logs import get_logger
from compute import ascend
from compute.kernels.operations import rotate
from services.llm.attention import RotaryTables, StepAttention
from services.llm.model_runner import ModelRunner
from services.llm.step_plan import StepPlan


class AscendModelRunner(ModelRunner):
    """A rank's weights and KV cache on an NPU."""

    def __init__(self, *args: Any) -> None:
        """Take what ModelRunner takes."""
        super().__init__(*args)
        self._objection = ascend.objection_to_attention(
            self._model.dtype, self._kv_cache.shape[-1], self._block_size
        )
        if self._objection:
            get_logger().warning("attention gathers its blocks", reason=self._objection)

    def _attention(self, plan: StepPlan) -> StepAttention:
        if self._objection:
            return super()._attention(plan)
        return AscendAttention(plan, self._model.device)


class AscendAttention:
    """A StepAttention by the operators of torch-npu."""

    def __init__(self, plan: StepPlan, device: torch.device) -> None:
        self._slots = torch.tensor(plan.slot_mapping, dtype=torch.int32, device=device)
        self._sequences = ascend.Sequences(
            plan.query_lens.cumsum().tolist(),
            plan.context_lens.tolist(),
            torch.tensor(plan.block_tables, dtype=torch.int32, device=device),
        )

    def run(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        tables: RotaryTables,
        scale: Tensor | None,
        cache: Tensor,
    ) -> Tensor:
        rotate(qkv, num_heads + num_kv_heads, *tables)
        q_THD, k_TKD, v_TKD = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
        ascend.store(k_TKD, v_TKD, cache, self._slots)
        if scale is not None:
            q_THD = q_THD * scale[:, None, None]
        return ascend.attend(q_THD, cache, self._sequences).flatten(1)
