"""Tensor parallelism: the share of a rank, and how the results of all ranks are combined.

The collectives are those of torch.distributed (gloo, NCCL, HCCL). Ranks on the CPUs of one host use
shared memory instead, because a gloo all-reduce of a decode step is nearly all latency (see
docs/performance.md).
"""

import datetime
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from compute import ascend

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": ascend.COLLECTIVES}
# A group may be idle for days. The death of a rank shows as a broken connection, not as a time-out.
PATIENCE = datetime.timedelta(days=365)
FLAG_BYTES = 64
"""A flag fills a cache line, so that writing one does not slow the reading of another."""
NUM_SLOTS = 2
MAX_NAME_BYTES = 800
"""A name has at most 200 characters."""
SPINS_BEFORE_SLEEP = 2000
NAP_SECONDS = 50e-6


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of one rank of whatever is split, and the collectives of the ranks."""

    rank: int = 0
    world_size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = field(default=lambda partial: partial)
    """Sums the parts of all ranks."""
    all_gather: Callable[[Tensor], Tensor] = field(default=lambda part: part)
    """Joins the parts of all ranks along the last dimension."""
    agree: Callable[[int], int] = field(default=lambda count: count)
    """Returns the least number of all ranks."""

    def split(self, count: int) -> tuple[int, int]:
        """Return the bounds of this rank's share of `count` things."""
        share = count // self.world_size
        return self.rank * share, (self.rank + 1) * share

    def split_kv_heads(self, count: int) -> tuple[int, int]:
        """Return the bounds of this rank's key heads.

        Ranks share a key head if there are fewer heads than ranks.
        """
        if count >= self.world_size:
            return self.split(count)
        first = self.rank * count // self.world_size
        return first, first + 1


def join_group(
    rank: int, world_size: int, rendezvous: str, device: torch.device, max_elements: int
) -> Shard:
    """Wait for all ranks at the rendezvous, and return the share of this one.

    The rendezvous is an init_method of torch.distributed: file://PATH or tcp://HOST:PORT. No
    collective moves more than `max_elements`.
    """
    if world_size == 1:
        return Shard()
    dist.init_process_group(
        BACKENDS[device.type], rendezvous, timeout=PATIENCE, rank=rank, world_size=world_size
    )
    if device.type == "cpu" and (shared := share_memory(rank, world_size, max_elements)):
        return Shard(rank, world_size, shared.all_reduce, shared.all_gather, partial(agree, device))
    return Shard(rank, world_size, all_reduce, all_gather, partial(agree, device))


def all_reduce(part: Tensor) -> Tensor:
    dist.all_reduce(part)
    return part


def all_gather(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, -1)


def agree(device: torch.device, count: int) -> int:
    least = torch.tensor([count], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least.item())


def names_of_ranks(name: str, shard: Shard, device: torch.device) -> list[str]:
    """Return the names that all ranks pass, in the order of the ranks.

    They come from where the ranks met, so no other process can claim to be a rank.
    """
    if shard.world_size == 1:
        return [name]
    mine = torch.zeros(MAX_NAME_BYTES, dtype=torch.int64)
    data = name.encode()
    mine[: len(data)] = torch.tensor(list(data))
    names = all_gather(mine.to(device)).view(-1, MAX_NAME_BYTES).tolist()
    return [bytes(codes).rstrip(b"\0").decode() for codes in names]


class SharedMemory:
    """Collectives of ranks on one host through one mapped file.

    Each rank has a flag and NUM_SLOTS slots. In its n-th collective a rank writes its part into
    slot n % NUM_SLOTS, then n into its flag, and reads the others' slots once their flags are at n.
    A slot is written again in collective n + NUM_SLOTS, which no rank reaches before all have begun
    collective n + 1 and so have read n: two slots are enough. The order of the two writes is the
    processor's: x86 keeps it; elsewhere torch.distributed is used.
    """

    def __init__(self, path: Path, rank: int, world_size: int, max_elements: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._count = 0
        size = world_size * FLAG_BYTES + NUM_SLOTS * world_size * max_elements * 4
        with path.open("r+b") as file:
            os.ftruncate(file.fileno(), size)
            memory = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
        self._flags = memory[: world_size * FLAG_BYTES].view(np.int64)[:: FLAG_BYTES // 8]
        self._slots = (
            memory[world_size * FLAG_BYTES :]
            .view(np.float32)
            .reshape(NUM_SLOTS, world_size, max_elements)
        )
        self._tensors = torch.from_numpy(self._slots)

    def all_reduce(self, part: Tensor) -> Tensor:
        """Sum over all ranks in float32; the result has the dtype of the part."""
        return self._exchange(part).sum(0).to(part.dtype)

    def all_gather(self, part: Tensor) -> Tensor:
        """Join the parts of all ranks along the last dimension."""
        return torch.cat(self._exchange(part).to(part.dtype).unbind(0), -1)

    def _exchange(self, mine: Tensor) -> Tensor:
        """Return the parts of all ranks, float32 [world_size, *shape].

        It is a view that is valid until the next collective but one.
        """
        self._count += 1
        slot = self._tensors[self._count % NUM_SLOTS, :, : mine.numel()]
        slot[self._rank] = mine.reshape(-1)
        self._flags[self._rank] = self._count
        self._wait()
        return slot.view(self._world_size, *mine.shape)

    def _wait(self) -> None:
        """Wait for all ranks, and yield the core meanwhile: ranks may outnumber cores."""
        spins = 0
        while int(self._flags.min()) < self._count:
            spins += 1
            if spins < SPINS_BEFORE_SLEEP:
                os.sched_yield()
            else:
                time.sleep(NAP_SECONDS)


def share_memory(rank: int, world_size: int, max_elements: int) -> SharedMemory | None:
    """Return memory that all ranks share; None if a rank is on another host or cannot map it."""
    mark = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        mark[0] = int.from_bytes(os.urandom(7), "big")
    dist.broadcast(mark, 0)
    path = Path(f"/dev/shm/twinlens-{mark.item():x}")
    if rank == 0 and os.uname().machine == "x86_64" and os.access("/dev/shm", os.W_OK):
        path.touch(mode=0o600)
    dist.barrier()
    found = torch.tensor([path.exists()], dtype=torch.int64)
    dist.all_reduce(found)
    shared = None
    if found.item() == world_size:
        shared = SharedMemory(path, rank, world_size, max_elements)
    dist.barrier()
    if rank == 0:
        path.unlink(missing_ok=True)
    return shared
