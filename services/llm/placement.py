"""What a rank takes of its device: which card, how much memory for the KV cache, blocks of which
size, and the runner for it."""

from collections.abc import Callable

import torch

from common import cgroup
from common.checkpoint import Checkpoint
from common.sizing import Sizes, cache_bytes
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard

CPU_MEMORY_SHARE = 0.2
BLOCK_SIZE = 16
PAGED_BLOCK_SIZE = 256
"""The second is what the paged attention of CUDA asks for."""


def use_own_card(device: torch.device, rank: int) -> None:
    """The ranks of a host have a card each, as far as there are so many that this process sees."""
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())


def default_block_size(dtype: torch.dtype, device: torch.device) -> int:
    return PAGED_BLOCK_SIZE if device.type == "cuda" and dtype is not torch.float32 else BLOCK_SIZE


def available_memory(device: torch.device, num_sharing: int, num_weight_bytes: int) -> int:
    """Bytes that this rank's KV cache may take, before the weights are loaded; on the CPU all ranks
    of all groups share one memory.

    What an accelerator has left then is for activations, graphs, and a vision process beside this
    one, whichever starts first.
    """
    if device.type == "cuda":
        return cache_bytes(torch.cuda.mem_get_info(device)[0], num_weight_bytes)
    return int(cgroup.available_memory() * CPU_MEMORY_SHARE / num_sharing)


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype, world_size: int) -> int:
    """Of this rank's share of the language model, once it is loaded."""
    return Sizes(checkpoint, dtype.itemsize).rank_bytes(world_size)


def make_runner(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    num_blocks: int,
    block_size: int,
    progress: Callable[[float], None],
    shard: Shard,
    max_num_seqs: int,
    quantization: str = "none",
) -> ModelRunner:
    if device.type != "cuda":
        return ModelRunner(
            checkpoint, dtype, device, num_blocks, block_size, progress, shard, quantization
        )
    # Only here: what it imports of torch takes a second, which no other device is to wait for.
    from services.llm.cuda_model_runner import CudaModelRunner

    return CudaModelRunner(
        checkpoint, dtype, device, num_blocks, block_size, progress, shard, max_num_seqs
    )
