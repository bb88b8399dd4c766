"""Which device and dtype a computing service uses."""

import importlib.util
import os
import sys

import torch

from common.cgroup import core_limit
from common.checkpoint import Checkpoint
from common.config import BadSetting
from common.settings import DeviceSettings
from compute.kernels.library import bfloat16_kernels
from compute.torch_tensors import DTYPES

FEW_CORES = 4


def choose_device(name: str) -> torch.device:
    """The one line of device choice: cuda, then npu (torch-npu), then cpu.

    Raises
    ------
    BadSetting
        for a device that is not there.
    """
    has_npu = importlib.util.find_spec("torch_npu") is not None
    if name == "npu" and not has_npu:
        raise BadSetting("--device npu needs the package torch-npu, which is not installed")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadSetting(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install torch's "
            "CUDA build and a driver"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "npu" if has_npu else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The checkpoint's where the device computes it well: torch emulates bfloat16 slowly on a CPU
    without its instructions."""
    if name != "auto":
        return DTYPES[name]
    if (
        device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and bfloat16_kernels() is None
    ):
        return torch.float32
    stored = DTYPES.get(checkpoint.dtype, torch.bfloat16)
    return torch.bfloat16 if stored is torch.float16 and device.type == "cpu" else stored


def set_threads(threads: int | None, num_sharing: int) -> int:
    """By default half of the cores, because vision and language run side by side; all of them where
    there are so few that each would be slow alone. `num_sharing` processes of the language model
    share them."""
    cores = min(len(os.sched_getaffinity(0)), core_limit() or sys.maxsize)
    count = threads or max(1, (cores if cores <= FEW_CORES else cores // 2) // num_sharing)
    torch.set_num_threads(count)
    return count


def prepare(
    settings: DeviceSettings, checkpoint: Checkpoint, num_sharing: int = 1
) -> tuple[torch.device, torch.dtype]:
    device = choose_device(settings.device)
    set_threads(settings.threads, num_sharing)
    return device, choose_dtype(settings.dtype, device, checkpoint)
