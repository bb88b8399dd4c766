"""What a rank takes of its device: which card, how much memory for the KV cache, blocks of which size, and the runner for it."""

import os
from collections.abc import Callable
from math import prod

import torch

from common.checkpoint import Checkpoint
from common.weights import canonical_name
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard

CPU_MEMORY_SHARE = 0.2
ACCELERATOR_MEMORY_SHARE = 0.8
BLOCK_SIZE, PAGED_BLOCK_SIZE = 16, 256
"""The second is what the paged attention of CUDA asks for."""


def use_own_card(device: torch.device, rank: int) -> None:
    """The ranks of a host have a card each, as far as there are so many that this process sees."""
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())


def default_block_size(dtype: torch.dtype, device: torch.device) -> int:
    return PAGED_BLOCK_SIZE if device.type == "cuda" and dtype is not torch.float32 else BLOCK_SIZE


def available_memory(device: torch.device, num_sharing: int, num_weight_bytes: int) -> int:
    """Bytes that this rank's KV cache may take, before the weights are loaded; on the CPU all ranks of all groups share one memory.

    What an accelerator has left then is for activations, graphs, and a vision process beside this one, whichever starts first.
    """
    if device.type == "cuda":
        return max(0, int(torch.cuda.mem_get_info(device)[0] * ACCELERATOR_MEMORY_SHARE) - num_weight_bytes)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_MEMORY_SHARE / num_sharing)


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype, world_size: int) -> int:
    """Of this rank's share of the language model, once it is loaded."""
    shapes = [info.shape for name, info in checkpoint.tensors.items() if not canonical_name(name).startswith("model.visual.")]
    return sum(map(prod, shapes)) * dtype.itemsize // world_size


def make_runner(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    num_blocks: int,
    block_size: int,
    progress: Callable[[float], None],
    shard: Shard,
    max_num_seqs: int,
) -> ModelRunner:
    if device.type != "cuda":
        return ModelRunner(checkpoint, dtype, device, num_blocks, block_size, progress, shard)
    # Only here: what it imports of torch takes a second, which no other device is to wait for.
    from services.llm.cuda_model_runner import CudaModelRunner

    return CudaModelRunner(checkpoint, dtype, device, num_blocks, block_size, progress, shard, max_num_seqs)
