"""What a backend of attention is: kernels that read the paged KV cache of a CUDA card in place.

A backend computes attention in two ways. For a step plan of any mix it runs eagerly. For decodes
it is captured in a CUDA graph, which is replayed for every batch of one size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from compute.kernels.operations import rotate_and_store
from services.llm.attention import RotaryTables
from services.llm.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of one rank's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int
    """Tokens of a block of the KV cache."""


class Attend(Protocol):
    """The attention of one batch, the same for every layer."""

    def __call__(self, q_THD: Tensor, cache: Tensor, scale_T: Tensor | None) -> Tensor:
        """Return [T, H, D].

        The keys and values of the batch are in `cache`, [2, num_blocks, block_size, K, D], already.
        `scale_T` are factors of the queries; None for one.
        """


class PlannedAttention(Protocol):
    """The attention of one step plan."""

    @property
    def arrays(self) -> list[np.ndarray]:
        """What the card must know of the plan, int64 each, to be uploaded with the rest."""
        ...

    def bind(self, uploaded: list[Tensor]) -> Attend:
        """Return the attention, given the arrays on the card, int32 each."""
        ...


class CapturedDecodes(Protocol):
    """The attention of a fixed number of decodes, for one graph, which must not outlive it."""

    def prepare(self, context_lens: np.ndarray, block_tables: np.ndarray) -> None:
        """Do what the host must do before the capture and before each replay.

        int64 [num_seqs], and [num_seqs, width], as the graph is about to read them.
        """

    def bind(self, context_lens: Tensor, block_tables: Tensor) -> Attend:
        """Return the attention that is captured, given the graph's inputs, int32 each."""
        ...


class PagedBackend(ABC):
    """A backend of attention for the shapes of one model."""

    name: ClassVar[str]
    block_size: ClassVar[int]
    """Tokens of a block if the user names no number."""

    @abstractmethod
    def __init__(self, shapes: Shapes, device: torch.device) -> None: ...

    @classmethod
    @abstractmethod
    def objection(cls, shapes: Shapes, device: torch.device) -> str:
        """Return why it cannot compute such shapes on the device; "" if nothing is known of it."""

    @classmethod
    def errors(cls) -> tuple[type[Exception], ...]:
        """Return what it may raise on a device on which it does not run."""
        return (RuntimeError,)

    @abstractmethod
    def of_plan(self, plan: StepPlan) -> PlannedAttention:
        """Return the attention of a plan."""

    @abstractmethod
    def of_decodes(self, num_seqs: int, width: int) -> CapturedDecodes:
        """Return the attention of `num_seqs` decodes with block tables of `width` blocks each."""


class PagedAttention:
    """A StepAttention by a backend."""

    def __init__(self, slots: Tensor, attend: Attend) -> None:
        """`slots` are int64 [T]: where the keys and values of the tokens go."""
        self._slots = slots
        self._attend = attend

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
        return self._attend(qkv[:, :num_heads], cache, scale).flatten(1)


@dataclass(frozen=True, slots=True)
class Part:
    """The decodes of a plan, or its chunks of several tokens."""

    rows: np.ndarray
    """int64: the rows of the batch that hold the tokens of this part."""
    query_starts: np.ndarray
    """int64: the first row of each sequence."""
    query_lens: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray


def parts_of(plan: StepPlan) -> Iterator[Part]:
    """Return the decodes and the chunks of a plan as separate parts.

    Only for decodes do kernels read a key head once for all its query heads, and split long
    contexts.
    """
    is_decode = plan.query_lens == 1
    starts = plan.query_lens.cumsum() - plan.query_lens
    for chosen in (is_decode, ~is_decode):
        if chosen.any():
            yield Part(
                np.flatnonzero(np.repeat(chosen, plan.query_lens)),
                starts[chosen],
                plan.query_lens[chosen],
                plan.context_lens[chosen],
                plan.block_tables[chosen],
            )


def scaled(q_THD: Tensor, scale_T: Tensor | None) -> Tensor:
    """Return the queries times their factors, for kernels that know none."""
    return q_THD if scale_T is None else q_THD * scale_T.to(q_THD.dtype)[:, None, None]
