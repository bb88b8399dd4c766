"""The ways to compute attention among patches, of which a tower on CUDA uses the fastest.

Patches come as groups that follow each other: windows, steps in time, or a whole image. A patch
attends to all patches of its group.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.vision.windows import attend_by_size

Groups = tuple[tuple[int, int], ...]
"""(number of groups, patches in each), in order."""


class AttendToGroups(Protocol):
    """One way to compute attention."""

    def __call__(
        self, qkv: Tensor, num_heads: int, groups: Groups, starts: Tensor | None
    ) -> Tensor:
        """[T, 3 * num_heads, dim] -> [T, num_heads * dim].

        `starts` is what `TowerAttention.starts_of` returned for the groups.
        """


def by_torch(qkv: Tensor, num_heads: int, groups: Groups, starts: Tensor | None) -> Tensor:
    """Attend by one scaled_dot_product_attention for each size of groups; needs no starts."""
    return attend_by_size(qkv, num_heads, groups)


def by_triton(qkv: Tensor, num_heads: int, groups: Groups, starts: Tensor | None) -> Tensor:
    """Attend by our own kernel, which takes groups of any sizes at once."""
    from compute.triton_kernels.dense_attention import attend_sequences

    assert starts is not None
    q, k, v = qkv.split(num_heads, 1)
    return attend_sequences(q, k, v, starts, largest(groups)).flatten(1)


def by_varlen(qkv: Tensor, num_heads: int, groups: Groups, starts: Tensor | None) -> Tensor:
    """Attend by torch's varlen_attn, in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    assert starts is not None
    longest = largest(groups)
    q, k, v = qkv.split(num_heads, 1)
    attended = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(attended, Tensor), "only the result was requested"
    return attended.flatten(1)


@dataclass(frozen=True, slots=True)
class TowerAttention:
    """How a tower attends inside of its windows, and among all patches of an image or step."""

    windowed: AttendToGroups = by_torch
    full: AttendToGroups = by_torch

    def starts_of(self, groups: Groups, device: torch.device) -> Tensor | None:
        """Return where each group starts and the last one ends, int32; None if nobody asks."""
        if self.windowed is by_torch and self.full is by_torch:
            return None
        counts, sizes = torch.tensor(groups).T
        ends = sizes.repeat_interleave(counts).cumsum(0)
        return F.pad(ends, (1, 0)).int().to(device)


def largest(groups: Groups) -> int:
    """Return the number of patches in the largest group."""
    return max(size for _, size in groups)
