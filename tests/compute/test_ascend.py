"""What is said where no NPU can be used, and that the calls of torch-npu are as documented."""

import sys
from collections.abc import Callable

import pytest
import torch

from common.config import BadSetting
from compute import ascend
from compute.device import choose_device
from tests import npu_on_cpu


def no_libraries() -> int:
    raise ImportError("libhccl.so: cannot open shared object file")


def no_driver() -> int:
    raise RuntimeError("drvGetDevNum failed")


def test_an_npu_is_refused_without_torch_npu() -> None:
    with pytest.raises(BadSetting, match="--device npu: it needs the package torch-npu"):
        choose_device("npu")


@pytest.mark.parametrize(
    ("device_count", "reason"),
    [
        (lambda: 0, "sees no NPU"),
        (no_libraries, "libhccl.so.*set_env.sh"),
        (no_driver, "drvGetDevNum failed"),
    ],
)
def test_an_npu_that_does_not_start_is_refused(
    device_count: Callable[[], int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu_on_cpu.pretend(monkeypatch, device_count)
    with pytest.raises(BadSetting, match=reason):
        choose_device("npu")
    assert choose_device("auto").kind == "cpu"


def test_a_broken_torch_npu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    npu_on_cpu.pretend(monkeypatch)
    monkeypatch.delattr(sys.modules["torch_npu"], "npu")
    monkeypatch.setattr("compute.ascend.npu", no_libraries)
    assert "does not start" in ascend.objection()


def test_an_npu_that_is_there_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    npu_on_cpu.pretend(monkeypatch)
    assert ascend.objection() == ""


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "objection"),
    [
        (torch.bfloat16, 128, 128, ""),
        (torch.float16, 128, 512, ""),
        (torch.float32, 128, 128, "float32"),
        (torch.bfloat16, 64, 128, "heads of 128, not 64"),
        (torch.bfloat16, 128, 16, "blocks"),
        (torch.bfloat16, 128, 640, "blocks"),
    ],
)
def test_the_limits_of_its_attention_are_known(
    dtype: torch.dtype, head_dim: int, block_size: int, objection: str
) -> None:
    found = ascend.objection_to_attention(dtype, head_dim, block_size)
    assert objection in found and bool(found) == bool(objection)


def test_its_attention_is_that_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = npu_on_cpu.pretend(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    cache = torch.full((2, 5, 4, 2, 8), torch.nan)
    k, v = torch.randn(2, 9, 2, 8, generator=generator)
    # A decode with 6 tokens in the blocks 3 and 1, and a whole prompt of 3 tokens in block 2.
    slots = torch.tensor([12, 13, 14, 15, 4, 5, 8, 9, 10], dtype=torch.int32)
    ascend.store(k, v, cache, slots)
    q = torch.randn(4, 6, 8, generator=generator)
    tables = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    found = ascend.attend(q, cache, ascend.Sequences([1, 4], [6, 3], tables))
    expected = torch.cat(
        (
            npu_on_cpu.attend(q[:1], k[:6], v[:6], 8**-0.5),
            npu_on_cpu.attend(q[1:], k[6:], v[6:], 8**-0.5),
        )
    )
    assert (found - expected).abs().max() < 1e-6
    assert operators.calls == ["store", "attend"]
