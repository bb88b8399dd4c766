"""What depends on the device: the dtype `auto`, the memory of the KV cache, the card."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compute.device import Device, choose_dtype

CPU = Device(torch.device("cpu"))
CUDA = Device(torch.device("cuda"))


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
    device: Device,
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


def test_the_cache_of_a_card_leaves_room_for_weights_and_for_a_fifth_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert CUDA.kv_cache_bytes(1, 300) == 500
    assert CUDA.kv_cache_bytes(2, 300) == 500, "each rank has a card of its own"
    assert CUDA.kv_cache_bytes(1, 900) == 0


def test_ranks_share_the_memory_of_a_host() -> None:
    assert CPU.kv_cache_bytes(8, 0) < CPU.kv_cache_bytes(2, 0) / 2


def test_the_cache_takes_its_share_of_what_the_container_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.cgroup.container_memory", lambda root: [1000])
    assert CPU.kv_cache_bytes(2, 0) == 100


def test_ranks_take_the_cards_of_a_host_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    used = [CUDA.use_card(rank) for rank in range(3)]
    assert taken == [0, 1, 0]
    assert used == [Device(torch.device("cuda", index)) for index in taken]
    assert CPU.use_card(1) == CPU and len(taken) == 3


def test_the_memory_of_a_rank_is_that_of_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (asked.append(device), (1000, 4000))[1]
    )
    CUDA.use_card(1).kv_cache_bytes(1, 300)
    assert asked == [torch.device("cuda:1")]


def test_an_npu_is_managed_by_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-npu itself was never at hand: this stands in for the calls that are made of it."""
    taken: list[int] = []
    cards = SimpleNamespace(
        device_count=lambda: 2,
        set_device=taken.append,
        mem_get_info=lambda device: (1000, 4000),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=cards))
    # Without torch-npu, torch knows no device of that name.
    monkeypatch.setattr(
        torch, "device", lambda kind, index: SimpleNamespace(type=kind, index=index)
    )
    npu = Device(SimpleNamespace(type="npu")).use_card(3)  # type: ignore[arg-type]
    assert taken == [1] and npu.torch_device.index == 1
    assert npu.kv_cache_bytes(1, 300) == 500
