"""The vision tower, for images of one size; it sees luma."""

from dataclasses import dataclass
from functools import cache

import torch
from kernels import Rotation, attend, rotate, rotations
from layers import MLP, RMSNorm, linear
from settings import (
    CELL,
    FULL_ATTENTION,
    IMAGE_MEAN,
    LUMA,
    PATCH,
    TEXT_SIZE,
    VISION_DEPTH,
    VISION_HEADS,
    VISION_INNER,
    VISION_SIZE,
    WINDOW,
)
from torch import nn

GREY_MEAN = sum(share * mean for share, mean in zip(LUMA, IMAGE_MEAN, strict=True))
GREY_STD = 0.27
PATCHES = (CELL // PATCH) ** 2  # in a cell


@dataclass
class WindowPlan:
    """Cells sorted by window, windows of equal size next to each other."""

    order: torch.Tensor
    back: torch.Tensor
    windows: list[tuple[int, int]]  # how many, of how many patches
    q: Rotation
    k: Rotation


def windows_by_size(rows: int, columns: int) -> dict[int, list[torch.Tensor]]:
    cells = torch.arange(rows * columns).view(rows, columns)
    by_size: dict[int, list[torch.Tensor]] = {}
    for band in cells.split(WINDOW // CELL):
        for window in band.split(WINDOW // CELL, 1):
            by_size.setdefault(window.numel(), []).append(window.flatten())
    return by_size


def patch_positions(rows: int, columns: int, order: torch.Tensor) -> torch.Tensor:
    """-> row and column of every patch, cell by cell"""
    grid = torch.stack(
        torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij"), -1
    )
    cells = grid.view(rows, 2, columns, 2, 2).transpose(1, 2).reshape(rows * columns, PATCHES, 2)
    return cells[order].flatten(0, 1)


@cache
def window_plan(rows: int, columns: int, dtype: torch.dtype) -> WindowPlan:
    """`dtype`: that of the activations, which the rotations have too"""
    by_size = windows_by_size(rows, columns)
    order = torch.cat([window for windows in by_size.values() for window in windows])
    half = VISION_SIZE // VISION_HEADS // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2).float() / half)
    angles = (patch_positions(rows, columns, order)[..., None] * frequencies).flatten(1)
    return WindowPlan(
        order,
        order.argsort(),
        [(len(ws), PATCHES * size) for size, ws in by_size.items()],
        *rotations(angles),
    )


class VisionAttention(nn.Module):
    def __init__(self, full: bool) -> None:
        super().__init__()
        self.full = full
        self.qkv = linear(VISION_SIZE, 3 * VISION_SIZE, True)
        self.proj = linear(VISION_SIZE, VISION_SIZE, True, zero=True)

    def forward(self, x: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
        batch, length, size = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, VISION_HEADS, -1).unbind(2)
        q = rotate(q, *plan.q)
        k = rotate(k, *plan.k)
        windows = [(1, length)] if self.full else plan.windows
        pieces = zip(
            *(t.split([count * patches for count, patches in windows], 1) for t in (q, k, v)),
            strict=True,
        )
        out = [
            self.in_windows(count, *piece)
            for (count, _), piece in zip(windows, pieces, strict=True)
        ]
        return self.proj(torch.cat(out, 1).view(batch, length, size))

    def in_windows(self, count: int, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(1, (count, -1)).transpose(2, 3) for t in qkv)
        return attend(q, k, v).transpose(2, 3).flatten(3).flatten(1, 2)


class VisionBlock(nn.Module):
    def __init__(self, full: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(VISION_SIZE)
        self.norm2 = RMSNorm(VISION_SIZE)
        self.attn = VisionAttention(full)
        self.mlp = MLP(VISION_SIZE, VISION_INNER, True)

    def forward(self, x: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), plan)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = PATCHES * VISION_SIZE
        self.ln_q = RMSNorm(VISION_SIZE)
        self.mlp = nn.Sequential(
            linear(inner, inner, True), nn.GELU(), linear(inner, TEXT_SIZE, True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).unflatten(1, (-1, PATCHES)).flatten(2))


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = linear(PATCH * PATCH, VISION_SIZE, False)


class VisionTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.blocks = nn.ModuleList(VisionBlock(i in FULL_ATTENTION) for i in range(VISION_DEPTH))
        self.merger = Merger()

    def forward(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [batch, height, width] -> one embedding for each cell [batch, cells, TEXT_SIZE]"""
        batch, height, width = images.shape
        rows = height // CELL
        columns = width // CELL
        plan = window_plan(rows, columns, dtype)
        x = (images.float() / 255 - GREY_MEAN) / GREY_STD
        x = (
            x.view(batch, rows, 2, PATCH, columns, 2, PATCH)
            .permute(0, 1, 4, 2, 5, 3, 6)
            .reshape(batch, rows * columns, PATCHES, -1)
        )
        x = self.patch_embed.proj(x[:, plan.order].flatten(1, 2)).float()
        for block in self.blocks:
            x = block(x, plan)
        return self.merger(x)[:, plan.back]
