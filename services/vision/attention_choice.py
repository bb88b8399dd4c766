"""Chooses how a tower on CUDA attends, by measuring each way at the shapes of the tower."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from common.logs import get_logger
from compute import triton_kernels
from compute.attention_choice import (
    TOLERANCES,
    Trial,
    fastest,
    figures_of,
    nanoseconds_of,
    objection_to_card,
    reason_of,
)
from compute.cuda_graphs import GraphPool
from services.vision.attention import (
    AttendToGroups,
    Groups,
    TowerAttention,
    by_torch,
    by_triton,
    by_varlen,
)

SAMPLE_SIZES = ((448, 448), (728, 1288))
"""Height and width in pixels of the images at whose shapes a tower is measured."""
CASES = tuple(f"{width}x{height}" for height, width in SAMPLE_SIZES)
WEIGHTS = (1,) * len(CASES)
CALLS = 4
"""The calls in a captured graph, as if for the blocks of a tower."""
WAYS: dict[str, AttendToGroups] = {"torch": by_torch, "triton": by_triton, "varlen": by_varlen}
"""All ways by their names. Among equally fast ones the first is chosen."""


@dataclass(frozen=True, slots=True)
class AttentionShapes:
    """The shapes of a tower's attention for the images of SAMPLE_SIZES."""

    num_heads: int
    head_dim: int
    groups: Mapping[str, tuple[Groups, ...]]
    """The groups in each sample image, for each field of TowerAttention that the tower uses."""


@runtime_checkable
class AttendingTower(Protocol):
    """A tower whose attention can be chosen."""

    attention: TowerAttention

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def attention_shapes(self) -> AttentionShapes:
        """Return the shapes at which the ways are measured."""
        ...


def choose_attention(tower: AttendingTower) -> None:
    """Let a tower attend by the fastest ways from now on, and log all figures."""
    shapes = tower.attention_shapes()
    for kind in shapes.groups:
        trials = [try_way(name, kind, shapes, tower) for name in WAYS]
        best = fastest(trials, WEIGHTS)
        if best is not None:
            tower.attention = replace(tower.attention, **{kind: WAYS[best.name]})
        get_logger().info(
            "chose attention of the vision tower",
            kind=kind,
            attention=best.name if best else "torch",
            **figures_of(trials, CASES),
        )
    torch.cuda.empty_cache()


def try_way(name: str, kind: str, shapes: AttentionShapes, tower: AttendingTower) -> Trial:
    """Return what came of checking and timing a way."""
    if objection := objection_to(name, tower.dtype, tower.device):
        return Trial(name, objection=objection)
    try:
        return timed(name, shapes, shapes.groups[kind], tower)
    except errors() as e:
        return Trial(name, objection=reason_of(e))


def objection_to(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return why a way cannot compute; "" if nothing is known of it."""
    if name == "triton" and not triton_kernels.serve(device):
        return triton_kernels.objection() or f"it runs on CUDA, not on {device.type}"
    if name == "varlen" and dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    return "" if name == "torch" else objection_to_card(device)


def errors() -> tuple[type[Exception], ...]:
    """Return what a way may raise on a card or in a torch with which it does not run."""
    return (RuntimeError, ImportError, TypeError, *triton_kernels.errors())


@torch.inference_mode()
def timed(
    name: str, shapes: AttentionShapes, samples: tuple[Groups, ...], tower: AttendingTower
) -> Trial:
    """Return the time of one block's attention for each sample, if the results are right."""
    attend = WAYS[name]
    pool = GraphPool(tower.device)
    times = []
    for groups in samples:
        length = sum(count * size for count, size in groups)
        size = (length, 3 * shapes.num_heads, shapes.head_dim)
        qkv = torch.empty(size, dtype=tower.dtype, device=tower.device).normal_()
        starts = TowerAttention(full=attend).starts_of(groups, tower.device)
        run = partial(attend, qkv, shapes.num_heads, groups, starts)
        wanted = by_torch(qkv, shapes.num_heads, groups, None)
        difference = float((run() - wanted).abs().max())
        if not difference < TOLERANCES[tower.dtype]:
            return Trial(name, objection=f"its results are wrong by {difference:.2g}")
        graph = pool.capture(partial(repeat, run))
        times.append(nanoseconds_of(graph.replay, tower.device) // CALLS)
    return Trial(name, tuple(times))


def repeat(run: Callable[[], Tensor]) -> Tensor:
    for _ in range(CALLS - 1):
        run()
    return run()
