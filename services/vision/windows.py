"""Attention inside the windows of a grid, for towers in which a patch attends to its window only.

Units (the squares of patches that become one embedding) are sorted by window. There are two ways to
attend inside the windows:

- By size: windows of equal size stand next to each other, and all of one size are one batch.
- By chunks of a fixed length, for static shapes: a chunk is as long as a whole window. So a patch
  and all that it attends to lie within three neighbouring chunks, and a mask says where.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels.operations import attention

PADDING = -1
OUTSIDE = -2


def window_order(height: int, width: int, side: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the units of a grid sorted by window, and (number of windows, units in each) per size.

    Windows of equal size follow each other. Windows at the right and the lower edge are smaller if
    `side` does not divide the grid.
    """
    units = torch.arange(height * width).view(height, width)
    by_size: dict[int, list[Tensor]] = {}
    for rows in units.split(side):
        for window in rows.split(side, dim=1):
            by_size.setdefault(window.numel(), []).append(window.flatten())
    order = torch.cat([window for same in by_size.values() for window in same])
    return order, [(len(same), size) for size, same in by_size.items()]


def attend_by_size(qkv: Tensor, num_heads: int, windows: tuple[tuple[int, int], ...]) -> Tensor:
    """[T, 3 * num_heads, dim] -> [T, num_heads * dim], for (number of windows, patches in each)."""
    outputs = []
    start = 0
    for count, length in windows:
        stop = start + count * length
        q, k, v = qkv[start:stop].split(num_heads, 1)
        outputs.append(attention(q, k, v, num_seqs=count))
        start = stop
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_to_chunks(qkv: Tensor, num_heads: int, mask: Tensor) -> Tensor:
    """[T, 3 * num_heads, dim] -> [T, num_heads * dim], with a mask from `chunk_mask`."""
    chunk = mask.shape[-2]
    q, k, v = qkv.split(num_heads, 1)
    q = q.unflatten(0, (-1, chunk)).transpose(1, 2)
    k = with_neighbours(k, chunk)
    v = with_neighbours(v, chunk)
    attended = F.scaled_dot_product_attention(q, k, v, mask)
    return attended.transpose(1, 2).reshape(len(qkv), -1)


def attend_masked(qkv: Tensor, num_heads: int, mask: Tensor) -> Tensor:
    """[T, 3 * num_heads, dim] -> [T, num_heads * dim]: patches attend to those in the mask.

    `mask` is bool [1, 1, T, T], or [1, 1, 1, T] for all patches alike.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.split(num_heads, 1))
    attended = F.scaled_dot_product_attention(q, k, v, mask)
    return attended.transpose(1, 2).reshape(len(qkv), -1)


def window_numbers(windows: tuple[tuple[int, int], ...], length: int) -> Tensor:
    """Return the window of each of `length` patches, int64; PADDING after the last window.

    `windows` are pairs of (number of windows, patches in each).
    """
    sizes = torch.tensor([size for count, size in windows for _ in range(count)])
    numbers = torch.arange(len(sizes)).repeat_interleave(sizes)
    return F.pad(numbers, (0, length - len(numbers)), value=PADDING)


def chunk_mask(numbers: Tensor, chunk: int) -> Tensor:
    """Return which patches in its own and the neighbouring chunks each patch attends to.

    int64 [T], the window of each patch -> bool [T / chunk, 1, chunk, 3 * chunk].
    """
    around = F.pad(numbers, (chunk, chunk), value=OUTSIDE).unfold(0, 3 * chunk, chunk)
    return (numbers.view(-1, chunk, 1) == around[:, None])[:, None]


def step_mask(numbers: Tensor) -> Tensor:
    """Return which patches each patch attends to where it attends to its whole step in time.

    int64 [T], the step of each patch or PADDING -> bool [1, 1, T, T]; [1, 1, 1, T] for one step.
    """
    if numbers.max() < 1:
        return (numbers != PADDING)[None, None, None]
    return (numbers[:, None] == numbers)[None, None]


def with_neighbours(x: Tensor, chunk: int) -> Tensor:
    """[T, heads, dim] -> [T / chunk, heads, 3 * chunk, dim]: each chunk between its neighbours."""
    around = F.pad(x, (0, 0, 0, 0, chunk, chunk))
    return around.unfold(0, 3 * chunk, chunk).transpose(2, 3)
