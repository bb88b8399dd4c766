"""Which dtype `auto` is, by the device and what computes on it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compute.device import choose_dtype

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("stored", "device", "onednn", "kernels", "expected"),
    [
        ("bfloat16", CPU, True, None, torch.bfloat16),
        ("bfloat16", CPU, False, object(), torch.bfloat16),
        ("bfloat16", CPU, False, None, torch.float32),
        ("float16", CPU, False, object(), torch.bfloat16),
        ("float32", CPU, False, object(), torch.float32),
        ("float16", CUDA, False, None, torch.float16),
    ],
)
def test_auto_is_what_the_device_computes_well(
    stored: str,
    device: torch.device,
    onednn: bool,
    kernels: object,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr("compute.device.bfloat16_kernels", lambda: kernels)
    checkpoint: Any = SimpleNamespace(dtype=stored)
    assert choose_dtype("auto", device, checkpoint) == expected
    assert choose_dtype("float32", device, checkpoint) == torch.float32
