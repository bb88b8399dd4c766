"""Attention by FlashInfer, an optional package.

Its host plans each step before the card runs it. Mixed steps run its kernels of prefill, which
compute decodes as well. Captured decodes have wrappers with memory of a fixed address, which the
host fills before each replay.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.llm.attention_backends.protocol import Attend, PagedBackend, Shapes, scaled
from services.llm.step_plan import StepPlan

WORKSPACE_BYTES = 384 << 20
"""For partial results of divided contexts. 128 MiB are recommended, and too few for some shapes."""
HEAD_DIMS = (64, 128, 256)
LAYOUT = "NHD"
"""The order of our blocks: tokens, heads, head_dim."""


class ByFlashInfer(PagedBackend):
    """FlashInfer's kernels."""

    name = "flashinfer"
    block_size = 64

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        import flashinfer

        self._shapes = shapes
        self._device = device
        # All wrappers share it: the card runs one after the other.
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT)
        self._guard = PlanGuard()

    @classmethod
    def objection(cls, shapes: Shapes, device: torch.device) -> str:
        if importlib.util.find_spec("flashinfer") is None:
            return "FlashInfer is not installed (the extra `flashinfer` brings it)"
        if shapes.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, not {shapes.dtype}"
        if shapes.head_dim not in HEAD_DIMS:
            return f"it takes heads of {', '.join(map(str, HEAD_DIMS))}, not {shapes.head_dim}"
        return ""

    @classmethod
    def errors(cls) -> tuple[type[Exception], ...]:
        """Its kernels are compiled at first use, for which Ninja or nvcc may be missing."""
        return (RuntimeError, ImportError, AttributeError, OSError, TypeError, ValueError)

    def of_plan(self, plan: StepPlan) -> "FlashInferPlan":
        return FlashInferPlan(self._prefill, self._guard, self._shapes, plan)

    def of_decodes(self, num_seqs: int, width: int) -> "FlashInferDecodes":
        return FlashInferDecodes(self._workspace, self._shapes, num_seqs, width, self._device)


class PlanGuard:
    """Keeps a wrapper's pinned memory from the next plan until the card has copied this one."""

    def __init__(self) -> None:
        self._copied: torch.cuda.Event | None = None

    def plan(self, plan: Callable[[], None]) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        plan()
        self._copied = torch.cuda.Event()
        self._copied.record()


@dataclass(frozen=True, slots=True)
class Pages:
    """The blocks of sequences as FlashInfer wants them, on the host."""

    starts: Tensor
    """int32 [num_seqs + 1]: where the blocks of each sequence begin among all."""
    last_lens: Tensor
    """int32 [num_seqs]: the tokens in the last block of each sequence."""
    blocks: np.ndarray
    """int64: the blocks of all sequences, one after the other."""

    @classmethod
    def of(cls, context_lens: np.ndarray, block_tables: np.ndarray, block_size: int) -> "Pages":
        num_blocks = -(-context_lens // block_size)
        is_used = np.arange(block_tables.shape[1]) < num_blocks[:, None]
        return cls(
            starts_of(num_blocks),
            host_tensor((context_lens - 1) % block_size + 1),
            block_tables[is_used],
        )


class FlashInferPlan:
    """A PlannedAttention in which every sequence is a chunk of a prefill."""

    def __init__(self, wrapper: Any, guard: PlanGuard, shapes: Shapes, plan: StepPlan) -> None:
        self._wrapper = wrapper
        self._guard = guard
        self._shapes = shapes
        self._query_lens = plan.query_lens
        self._pages = Pages.of(plan.context_lens, plan.block_tables, shapes.block_size)

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self._pages.blocks]

    def bind(self, uploaded: list[Tensor]) -> Attend:
        (blocks,) = uploaded
        shapes = self._shapes
        self._guard.plan(
            lambda: self._wrapper.plan(
                starts_of(self._query_lens),
                self._pages.starts,
                blocks,
                self._pages.last_lens,
                shapes.num_heads,
                shapes.num_kv_heads,
                shapes.head_dim,
                shapes.block_size,
                causal=True,
                q_data_type=shapes.dtype,
                kv_data_type=shapes.dtype,
            )
        )
        return Run(self._wrapper)


class FlashInferDecodes:
    """CapturedDecodes that the host plans before each replay."""

    def __init__(
        self, workspace: Tensor, shapes: Shapes, num_seqs: int, width: int, device: torch.device
    ) -> None:
        import flashinfer

        starts, blocks, last_lens = (
            torch.zeros(size, dtype=torch.int32, device=device)
            for size in (num_seqs + 1, num_seqs * width, num_seqs)
        )
        self._shapes = shapes
        self._device = device
        self._guard = PlanGuard()
        # Named, so that no other backend with other rules for graphs is chosen.
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=starts,
            paged_kv_indices_buffer=blocks,
            paged_kv_last_page_len_buffer=last_lens,
            backend="fa2",
        )

    def prepare(self, context_lens: np.ndarray, block_tables: np.ndarray) -> None:
        shapes = self._shapes
        pages = Pages.of(context_lens, block_tables, shapes.block_size)
        blocks = host_tensor(pages.blocks).to(self._device, non_blocking=True)
        self._guard.plan(
            lambda: self._wrapper.plan(
                pages.starts,
                blocks,
                pages.last_lens,
                shapes.num_heads,
                shapes.num_kv_heads,
                shapes.head_dim,
                shapes.block_size,
                q_data_type=shapes.dtype,
                kv_data_type=shapes.dtype,
            )
        )

    def bind(self, context_lens: Tensor, block_tables: Tensor) -> Attend:
        return Run(self._wrapper)


@dataclass(frozen=True, slots=True)
class Run:
    """An Attend by a wrapper that has been planned."""

    wrapper: Any

    def __call__(self, q_THD: Tensor, cache: Tensor, scale_T: Tensor | None) -> Tensor:
        return self.wrapper.run(scaled(q_THD, scale_T).contiguous(), (cache[0], cache[1]))


def starts_of(lens: np.ndarray) -> Tensor:
    """Return where parts of these lengths begin and where the last one ends, on the host."""
    return host_tensor(np.concatenate([[0], lens.cumsum()]))


def host_tensor(array: np.ndarray) -> Tensor:
    """Return an array as int32 on the host, pinned where there is a card to copy it."""
    tensor = torch.from_numpy(array.astype(np.int32))
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
