"""Attention by our own Triton kernels: any dtype, any size of blocks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compute import triton_kernels
from compute.attention_choice import objection_to_card
from services.llm.attention_backends.protocol import (
    Attend,
    PagedBackend,
    Part,
    Shapes,
    parts_of,
)
from services.llm.step_plan import StepPlan

if TYPE_CHECKING:
    from compute.triton_kernels.paged_attention import Sequences


class ByTriton(PagedBackend):
    """Our own kernels."""

    name = "triton"
    # A tile of the kernels has up to 128 keys. It is read at one address if it lies in one block.
    block_size = 128

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self._shapes = shapes
        self._device = device

    @classmethod
    def objection(cls, shapes: Shapes, device: torch.device) -> str:
        if not triton_kernels.serve(device):
            return triton_kernels.objection() or f"it runs on CUDA, not on {device.type}"
        return objection_to_card(device)

    @classmethod
    def errors(cls) -> tuple[type[Exception], ...]:
        return (RuntimeError, *triton_kernels.errors())

    def of_plan(self, plan: StepPlan) -> "TritonPlan":
        return TritonPlan(list(parts_of(plan)))

    def of_decodes(self, num_seqs: int, width: int) -> "TritonDecodes":
        return TritonDecodes(num_seqs, width * self._shapes.block_size, self._device)


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A PlannedAttention of one or two calls, which together compute every row of the batch."""

    parts: list[Part]

    @property
    def arrays(self) -> list[np.ndarray]:
        return [
            array
            for part in self.parts
            for array in (part.query_starts, part.query_lens, part.context_lens, part.block_tables)
        ]

    def bind(self, uploaded: list[Tensor]) -> Attend:
        from compute.triton_kernels.paged_attention import Sequences

        arrays = iter(uploaded)
        return Calls(
            [
                Sequences(
                    query_starts=next(arrays),
                    query_lens=next(arrays),
                    context_lens=next(arrays),
                    block_tables=next(arrays),
                    max_query=int(part.query_lens.max()),
                    max_context=int(part.context_lens.max()),
                )
                for part in self.parts
            ]
        )


class TritonDecodes:
    """CapturedDecodes for which the host does nothing."""

    def __init__(self, num_seqs: int, max_context: int, device: torch.device) -> None:
        self._starts = torch.arange(num_seqs, dtype=torch.int32, device=device)
        self._lens = torch.ones_like(self._starts)
        self._max_context = max_context

    def prepare(self, context_lens: np.ndarray, block_tables: np.ndarray) -> None:
        pass

    def bind(self, context_lens: Tensor, block_tables: Tensor) -> Attend:
        from compute.triton_kernels.paged_attention import Sequences

        sequences = Sequences(
            query_starts=self._starts,
            query_lens=self._lens,
            context_lens=context_lens,
            block_tables=block_tables,
            max_query=1,
            max_context=self._max_context,
        )
        return Calls([sequences])


@dataclass(frozen=True, slots=True)
class Calls:
    """An Attend of one call of the kernels for each part of a batch."""

    sequences: "list[Sequences]"

    def __call__(self, q_THD: Tensor, cache: Tensor, scale_T: Tensor | None) -> Tensor:
        from compute.triton_kernels.paged_attention import attend

        out = q_THD.new_empty(q_THD.shape)
        for sequences in self.sequences:
            attend(q_THD, cache, sequences, out, scale_T)
        return out
