"""The device that a computing service uses: which one, its memory, its dtype.

What only Ascend NPUs need is in `ascend.py`. CUDA and NPUs were never tried: no card was at hand
when this was written.
"""

from dataclasses import dataclass
from types import ModuleType

import torch

from common import cgroup
from common.cgroup import num_cores
from common.checkpoint import Checkpoint
from common.config import BadSetting
from common.settings import DeviceSettings
from common.sizing import cache_bytes
from compute import ascend
from compute.kernels.library import bfloat16_kernels
from compute.torch_tensors import DTYPES

FEW_CORES = 4
CPU_MEMORY_SHARE = 0.2
"""The share of the host's free memory that KV caches take by default."""
BLOCK_SIZE = 16
"""Tokens of a block of the KV cache, unless what computes attention on a card wants another."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device of this process."""

    torch_device: torch.device

    @property
    def kind(self) -> str:
        """cpu, cuda or npu."""
        return self.torch_device.type

    @property
    def is_accelerator(self) -> bool:
        """Whether it has memory of its own."""
        return self.kind != "cpu"

    def use_card(self, rank: int) -> "Device":
        """Return the card of a rank, and make it the current one of this thread.

        Each rank of a host has its own card, as far as this process sees enough cards. A device
        without a number is the current one of whichever thread uses it.
        """
        if not self.is_accelerator:
            return self
        cards = card_module(self.kind)
        index = rank % cards.device_count()
        cards.set_device(index)
        return Device(torch.device(self.kind, index))

    def kv_cache_bytes(self, num_sharing: int, num_weight_bytes: int) -> int:
        """Return the bytes that this process may use for its KV cache, before it loads weights.

        On the CPU, `num_sharing` processes share one memory. On an accelerator, what is left is for
        activations, graphs and a vision process on the same card, whichever starts first.
        """
        if self.is_accelerator:
            num_free_bytes, _ = card_module(self.kind).mem_get_info(self.torch_device)
            return cache_bytes(num_free_bytes, num_weight_bytes)
        return int(cgroup.available_memory() * CPU_MEMORY_SHARE / num_sharing)


def card_module(kind: str) -> ModuleType:
    """Return the part of torch that manages this kind of card."""
    return ascend.npu() if kind == "npu" else torch.cuda


def choose_device(name: str) -> Device:
    """Return the named device; for "auto" CUDA, else an NPU (torch-npu), else the CPU.

    Raises
    ------
    BadSetting
        if the device does not exist.
    """
    if name == "npu" and (objection := ascend.objection()):
        raise BadSetting(f"--device npu: {objection}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadSetting(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install "
            "torch's CUDA build and a driver"
        )
    if name == "auto":
        has_npu = not torch.cuda.is_available() and not ascend.objection()
        name = "cuda" if torch.cuda.is_available() else "npu" if has_npu else "cpu"
    return Device(torch.device(name))


def choose_dtype(name: str, device: Device, checkpoint: Checkpoint) -> torch.dtype:
    """Return the named dtype; for "auto" that of the checkpoint, if the device computes it well.

    On a CPU without bfloat16 instructions torch emulates bfloat16 slowly.
    """
    if name != "auto":
        return DTYPES[name]
    has_bfloat16 = device.is_accelerator or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not has_bfloat16 and bfloat16_kernels() is None:
        return torch.float32
    stored = DTYPES.get(checkpoint.dtype, torch.bfloat16)
    return torch.bfloat16 if stored is torch.float16 and not device.is_accelerator else stored


def set_threads(threads: int | None, num_sharing: int) -> int:
    """Set and return the number of CPU threads of this process.

    By default it is half of the cores, because vision and language run side by side. With few cores
    it is all of them, because each service would be slow alone. `num_sharing` processes of the
    language model share this number.
    """
    cores = num_cores()
    share = cores if cores <= FEW_CORES else cores // 2
    count = threads or max(1, share // num_sharing)
    torch.set_num_threads(count)
    return count


def prepare(
    settings: DeviceSettings, checkpoint: Checkpoint, num_sharing: int = 1
) -> tuple[Device, torch.dtype]:
    """Choose device and dtype, and set the number of threads."""
    device = choose_device(settings.device)
    set_threads(settings.threads, num_sharing)
    return device, choose_dtype(settings.dtype, device, checkpoint)
