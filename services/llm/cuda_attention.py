"""Attention on CUDA that reads the paged KV cache in place: torch's varlen_attn with block tables.

Its kernel is FlashAttention 2. It needs half precision, pages of a multiple of 256 tokens, and an
Ampere card or a newer one. Untried: no CUDA device was at hand when this was written.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from compute.kernels.operations import rotate_and_store
from services.llm.attention import RotaryTables
from services.llm.step_plan import StepPlan

PAGE_TOKENS = 256
MAX_HEAD_DIM = 256
AMPERE = (8, 0)
# Windows of varlen_attn: (tokens before, tokens after), -1 for all.
EVERYTHING = (-1, -1)
CAUSAL = (-1, 0)


def objection_to_pages(
    dtype: torch.dtype, head_dim: int, block_size: int, device: torch.device
) -> str:
    """Return why the kernel cannot read such a cache in place; "" if it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the paged kernel takes float16 and bfloat16, not {dtype}"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return (
            f"the paged kernel takes heads of a multiple of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
        )
    if block_size % PAGE_TOKENS:
        return (
            f"the paged kernel takes blocks of a multiple of {PAGE_TOKENS} tokens, not {block_size}"
        )
    if torch.cuda.get_device_capability(device) < AMPERE:
        return f"the paged kernel runs from compute capability {AMPERE} on"
    return attempt(dtype, head_dim, block_size, device)


def attempt(dtype: torch.dtype, head_dim: int, block_size: int, device: torch.device) -> str:
    """Return the error of the kernel for one token; "" if it works.

    torch may be built without the kernel.
    """
    one = torch.ones(1, dtype=torch.int64, device=device)
    table = torch.zeros(1, 1, dtype=torch.int64, device=device)
    q = torch.zeros(1, 2, head_dim, dtype=dtype, device=device)
    cache = torch.zeros(2, 1, block_size, 1, head_dim, dtype=dtype, device=device)
    try:
        Call.of(None, one, one, table, 1, 1).run(q, cache)
    except RuntimeError as e:
        return str(e)
    return ""


@dataclass(frozen=True, slots=True)
class Part:
    """The decodes of a plan, or its chunks of several tokens."""

    rows: np.ndarray
    """int64: the rows of the batch that hold the tokens of this part."""
    query_lens: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self.rows, self.query_lens, self.context_lens, self.block_tables]


def parts_of(plan: StepPlan) -> Iterator[Part]:
    """Return the decodes and the chunks of a plan as separate parts.

    Only for decodes does the kernel read a key head once for all its query heads, and split long
    contexts.
    """
    is_decode = plan.query_lens == 1
    for chosen in (is_decode, ~is_decode):
        if chosen.any():
            rows = np.flatnonzero(np.repeat(chosen, plan.query_lens))
            yield Part(
                rows, plan.query_lens[chosen], plan.context_lens[chosen], plan.block_tables[chosen]
            )


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of the kernel needs besides queries and cache."""

    rows: Tensor | None
    """int64: rows of the batch; None for all rows."""
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

    @classmethod
    def of(
        cls,
        rows: Tensor | None,
        query_lens: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        max_query: int,
        max_context: int,
    ) -> "Call":
        starts = [F.pad(lens.cumsum(0), (1, 0)).int() for lens in (query_lens, context_lens)]
        return cls(
            rows,
            starts[0],
            starts[1],
            context_lens.int(),
            block_tables.int(),
            max_query,
            max_context,
        )

    def run(self, q_THD: Tensor, cache: Tensor) -> Tensor:
        is_decode = self.max_query == 1
        # The kernel joins the parts of a split context correctly only if query heads share a key
        # head and each has one token.
        may_split = is_decode and q_THD.shape[1] > cache.shape[-2]
        # A decode sees its whole context, and the kernel handles its query heads together only
        # without a mask.
        attended = varlen_attn(
            q_THD,
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
        assert isinstance(attended, Tensor), "only the result was requested"
        return attended


class PagedAttention:
    """A StepAttention of one or two calls, whose rows together are the whole batch."""

    def __init__(self, slots: Tensor, calls: list[Call]) -> None:
        """`slots` are int64 [T]: where the keys and values of the tokens go."""
        self._slots = slots
        self._calls = calls

    @classmethod
    def of(cls, slots: Tensor, parts: list[Part], uploaded: list[Tensor]) -> "PagedAttention":
        """`uploaded` are the arrays of all parts in order, on the device."""
        arrays = iter(uploaded)
        calls = []
        for part in parts:
            rows, query_lens, context_lens, block_tables = (next(arrays) for _ in part.arrays)
            longest = int(part.query_lens.max()), int(part.context_lens.max())
            calls.append(
                Call.of(
                    rows if len(parts) > 1 else None,
                    query_lens,
                    context_lens,
                    block_tables,
                    *longest,
                )
            )
        return cls(slots, calls)

    def run(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        tables: RotaryTables,
        scale: Tensor | None,
        cache: Tensor,
    ) -> Tensor:
        rotate_and_store(qkv, num_heads, num_kv_heads, *tables, cache, self._slots)
        q_THD = qkv[:, :num_heads]
        if scale is not None:
            q_THD = q_THD * scale[:, None, None]
        out = [
            call.run(q_THD if call.rows is None else q_THD.index_select(0, call.rows), cache)
            for call in self._calls
        ]
        if len(out) == 1:
            return out[0].flatten(1)
        joined = q_THD.new_empty(q_THD.shape)
        for call, part in zip(self._calls, out, strict=True):
            assert call.rows is not None, "one of several calls is not the whole batch"
            joined.index_copy_(0, call.rows, part)
        return joined.flatten(1)
