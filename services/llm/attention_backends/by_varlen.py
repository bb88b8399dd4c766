"""Attention by torch's varlen_attn with a block table, which later versions of torch have.

Its kernel is FlashAttention 2. It needs half precision, blocks of a multiple of 256 tokens, and an
Ampere card or a newer one.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compute.attention_choice import objection_to_card
from services.llm.attention_backends.protocol import (
    Attend,
    PagedBackend,
    Part,
    Shapes,
    parts_of,
    scaled,
)
from services.llm.step_plan import StepPlan

PAGE_TOKENS = 256
MAX_HEAD_DIM = 256
# Windows of varlen_attn: (tokens before, tokens after), -1 for all.
EVERYTHING = (-1, -1)
CAUSAL = (-1, 0)
NEEDED_ARGUMENTS = {"window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}


def kernel() -> Callable[..., Any] | None:
    """Return torch's varlen_attn; None if this torch has none that reads a block table.

    Imported only here: it takes a second.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return (
        varlen_attn
        if inspect.signature(varlen_attn).parameters.keys() >= NEEDED_ARGUMENTS
        else None
    )


class ByVarlen(PagedBackend):
    """FlashAttention 2 in torch."""

    name = "varlen"
    block_size = PAGE_TOKENS

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        found = kernel()
        assert found is not None, "it has no objection"
        self._kernel = found
        self._shapes = shapes
        self._device = device

    @classmethod
    def objection(cls, shapes: Shapes, device: torch.device) -> str:
        if shapes.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, not {shapes.dtype}"
        if shapes.head_dim > MAX_HEAD_DIM or shapes.head_dim % 8:
            return f"it takes heads of a multiple of 8 up to {MAX_HEAD_DIM}, not {shapes.head_dim}"
        if shapes.block_size % PAGE_TOKENS:
            return f"it takes blocks of a multiple of {PAGE_TOKENS} tokens, not {shapes.block_size}"
        if kernel() is None:
            return f"varlen_attn of torch {torch.__version__} takes no block table"
        return objection_to_card(device)

    @classmethod
    def errors(cls) -> tuple[type[Exception], ...]:
        return (RuntimeError, TypeError)

    def of_plan(self, plan: StepPlan) -> "VarlenPlan":
        return VarlenPlan(self._kernel, list(parts_of(plan)))

    def of_decodes(self, num_seqs: int, width: int) -> "VarlenDecodes":
        max_context = width * self._shapes.block_size
        return VarlenDecodes(self._kernel, num_seqs, max_context, self._device)


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of the kernel needs besides queries and cache."""

    kernel: Callable[..., Any]
    query_starts: Tensor
    """int32 [num_seqs + 1]."""
    context_starts: Tensor
    """int32 [num_seqs + 1]."""
    context_lens: Tensor
    """int32 [num_seqs]."""
    block_tables: Tensor
    """int32 [num_seqs, max_num_blocks]."""
    max_query: int
    max_context: int

    def __call__(self, q_THD: Tensor, cache: Tensor, scale_T: Tensor | None) -> Tensor:
        is_decode = self.max_query == 1
        # The kernel joins the parts of a split context correctly only if query heads share a key
        # head and each has one token.
        may_split = is_decode and q_THD.shape[1] > cache.shape[-2]
        # A decode sees its whole context, and the kernel handles its query heads together only
        # without a mask.
        return self.kernel(
            scaled(q_THD, scale_T),
            cache[0],
            cache[1],
            self.query_starts,
            self.context_starts,
            self.max_query,
            self.max_context,
            window_size=EVERYTHING if is_decode else CAUSAL,
            enable_gqa=True,
            seqused_k=self.context_lens,
            block_table=self.block_tables,
            num_splits=None if may_split else 1,
        )


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """A PlannedAttention of one or two calls."""

    kernel: Callable[..., Any]
    parts: list[Part]

    @property
    def arrays(self) -> list[np.ndarray]:
        return [
            array
            for part in self.parts
            for array in (
                part.rows,
                starts_of(part.query_lens),
                starts_of(part.context_lens),
                part.context_lens,
                part.block_tables,
            )
        ]

    def bind(self, uploaded: list[Tensor]) -> Attend:
        arrays = iter(uploaded)
        calls = []
        for part in self.parts:
            rows = next(arrays).long()
            call = Call(
                self.kernel,
                query_starts=next(arrays),
                context_starts=next(arrays),
                context_lens=next(arrays),
                block_tables=next(arrays),
                max_query=int(part.query_lens.max()),
                max_context=int(part.context_lens.max()),
            )
            calls.append((rows, call))
        return calls[0][1] if len(calls) == 1 else Mixed(calls)


@dataclass(frozen=True, slots=True)
class Mixed:
    """An Attend of several calls, each for its rows of the batch."""

    calls: list[tuple[Tensor, Call]]

    def __call__(self, q_THD: Tensor, cache: Tensor, scale_T: Tensor | None) -> Tensor:
        q_THD = scaled(q_THD, scale_T)
        out = q_THD.new_empty(q_THD.shape)
        for rows, call in self.calls:
            out.index_copy_(0, rows, call(q_THD.index_select(0, rows), cache, None))
        return out


class VarlenDecodes:
    """CapturedDecodes for which the host does nothing."""

    def __init__(
        self, kernel: Callable[..., Any], num_seqs: int, max_context: int, device: torch.device
    ) -> None:
        self._kernel = kernel
        self._query_starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        self._max_context = max_context

    def prepare(self, context_lens: np.ndarray, block_tables: np.ndarray) -> None:
        pass

    def bind(self, context_lens: Tensor, block_tables: Tensor) -> Attend:
        context_starts = F.pad(context_lens.cumsum(0), (1, 0)).int()
        return Call(
            self._kernel,
            self._query_starts,
            context_starts,
            context_lens,
            block_tables,
            1,
            self._max_context,
        )


def starts_of(lens: np.ndarray) -> np.ndarray:
    """Return where sequences of these lengths begin, and where the last one ends."""
    return np.concatenate([[0], lens.cumsum()])
