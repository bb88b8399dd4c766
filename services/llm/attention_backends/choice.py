"""Chooses the backend of attention of a language group, and with it the size of its blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.checkpoint import Checkpoint
from common.config import BadSetting
from common.families import ModelSizes
from common.logs import get_logger
from common.settings import LlmSettings
from compute import ascend
from compute.attention_choice import agreed, fastest, figures_of
from compute.device import BLOCK_SIZE, Device
from services.llm.attention_backends import BACKENDS
from services.llm.attention_backends.protocol import PagedBackend, Shapes
from services.llm.attention_backends.trials import CASES, WEIGHTS, Room, objection_to, try_backend
from services.llm.parallel import Shard

GATHER = "gather"
"""The setting for attention that gathers the blocks of a sequence, and captures no graphs."""


@dataclass(frozen=True, slots=True)
class ChosenAttention:
    """What computes a rank's attention, and the tokens of a block."""

    backend: type[PagedBackend] | None
    """None: blocks are gathered, unless an NPU has operators for them."""
    block_size: int


def gathering(settings: LlmSettings) -> ChosenAttention:
    """Return attention that gathers blocks, or the choice for a model without a KV cache."""
    return ChosenAttention(None, settings.block_size or BLOCK_SIZE)


def choose_attention(
    settings: LlmSettings,
    checkpoint: Checkpoint,
    device: Device,
    dtype: torch.dtype,
    shard: Shard,
    tick: Callable[[], None] = lambda: None,
) -> ChosenAttention:
    """Return the attention that the settings name, or the fastest; all ranks of a group agree.

    `tick` is called between backends, which may compile kernels for a minute each.

    Raises
    ------
    BadSetting
        if the named backend cannot run here.
    """
    name = settings.attention
    if name == "auto" and device.kind == "npu":
        return ChosenAttention(None, settings.block_size or ascend.BLOCK_SIZE)
    if name == GATHER or (name == "auto" and device.kind != "cuda"):
        return gathering(settings)
    if device.kind != "cuda":
        raise BadSetting(f"--attention {name} runs on CUDA, not on {device.kind}: give auto")
    shapes = {
        kind: shapes_of(checkpoint.sizes, shard, dtype, settings.block_size or kind.block_size)
        for kind in BACKENDS.values()
    }
    if name != "auto":
        kind = BACKENDS[name]
        check_named(kind, shapes[kind], device.torch_device, shard)
        return ChosenAttention(kind, shapes[kind].block_size)
    room = Room(settings.max_num_seqs, settings.max_model_len or checkpoint.max_model_len)
    trials = []
    for kind in shapes:
        trials.append(try_backend(kind, shapes[kind], room, device.torch_device))
        torch.cuda.empty_cache()
        tick()
    trials = agreed(trials, len(CASES), shard.agree)
    best = fastest(trials, WEIGHTS)
    figures = figures_of(trials, CASES)
    if best is None:
        get_logger().warning(
            "attention gathers its blocks, and decodes are not captured as graphs", **figures
        )
        return gathering(settings)
    kind = BACKENDS[best.name]
    get_logger().info(
        "chose attention", attention=best.name, block_size=shapes[kind].block_size, **figures
    )
    return ChosenAttention(kind, shapes[kind].block_size)


def shapes_of(sizes: ModelSizes, shard: Shard, dtype: torch.dtype, block_size: int) -> Shapes:
    """Return the shapes of a rank's share of the attention."""
    first, last = shard.split_kv_heads(sizes.num_kv_heads)
    num_heads = sizes.heads_per_rank(shard.world_size)
    return Shapes(num_heads, last - first, sizes.head_dim, dtype, block_size)


def check_named(
    kind: type[PagedBackend], shapes: Shapes, device: torch.device, shard: Shard
) -> None:
    """Raise BadSetting on every rank if one of them cannot run the backend."""
    objection = objection_to(kind, shapes, device)
    can_all_run = shard.agree(0 if objection else 1)
    if not can_all_run:
        reason = objection or "another rank of the group cannot run it"
        raise BadSetting(f"--attention {kind.name}: {reason}; give another, or auto")
