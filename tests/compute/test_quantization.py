"""Products with weights of eight bits equal those with what these weights mean."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from benchmarks.quantized import fp8
from common.config import BadSetting
from compute.kernels.library import int8_kernels
from compute.quantization import (
    Int8Linear,
    check_quantization,
    quantize,
    rounding_error,
    scales_of_fp8,
)
from compute.quantized_weights import Fp8Weight
from tests.compute.test_linear import random, relative_error

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(int8_kernels() is None, reason="no AVX2, or no compiler")
BFLOAT16 = torch.bfloat16


@needs_kernels
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(64, 32), (33, 31), (1152, 896), (40, 9000)]
)
def test_a_product_equals_that_of_the_dequantised_weights(
    num_outputs: int, num_inputs: int
) -> None:
    weight = random(num_outputs, num_inputs, dtype=BFLOAT16) * num_inputs**-0.5
    bias = random(num_outputs, dtype=BFLOAT16)
    quantized, scales = quantize(weight)
    meant = quantized.float() * scales[:, None]
    linear = Int8Linear(weight, bias)
    without_bias = Int8Linear(weight)
    for num_rows in (0, 1, 2, 3, 7, 16, 101, 230):
        x = random(num_rows, num_inputs, dtype=BFLOAT16)
        residual = random(num_rows, num_outputs, dtype=BFLOAT16)
        product = F.linear(x.float(), meant)
        assert relative_error(without_bias(x), product) < 0.005
        assert (
            relative_error(linear(x, residual), product + bias.float() + residual.float()) < 0.005
        )


@needs_kernels
def test_what_another_product_left_behind_does_not_reach_a_row() -> None:
    linear = Int8Linear(random(64, 31, dtype=BFLOAT16))
    x = random(1, 31, dtype=BFLOAT16)
    expected = linear(x)
    Int8Linear(random(64, 64, dtype=BFLOAT16))(torch.full((1, 64), torch.nan, dtype=BFLOAT16))
    assert linear(x).equal(expected)


@needs_kernels
def test_neither_rows_beside_it_nor_threads_change_a_row() -> None:
    linear = Int8Linear(random(500, 600, dtype=BFLOAT16))
    x = random(130, 600, dtype=BFLOAT16)
    before = torch.get_num_threads()
    together = linear(x)
    torch.set_num_threads(3)
    try:
        for num_rows in (1, 2, 5, 16, 130):
            assert linear(x[:num_rows]).equal(together[:num_rows])
    finally:
        torch.set_num_threads(before)


def test_a_weight_is_off_by_at_most_half_a_step_of_its_output() -> None:
    weight = random(20, 300) * torch.logspace(-6, 3, 20)[:, None]
    weight[7] = 0
    quantized, scales = quantize(weight)
    assert ((quantized.float() * scales[:, None] - weight).abs() <= 0.501 * scales[:, None]).all()
    assert quantized.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(20)]


@pytest.mark.parametrize(("device", "dtype"), [("cuda", BFLOAT16), ("cpu", torch.float32)])
def test_where_it_does_not_apply_it_is_refused(device: str, dtype: torch.dtype) -> None:
    with pytest.raises(
        BadSetting, match="--quantization int8 is for --device cpu with --dtype bfloat16"
    ):
        check_quantization("int8", torch.device(device), dtype)
    check_quantization("none", torch.device(device), dtype)


def test_a_cpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compute.quantization.int8_kernels", lambda: None)
    with pytest.raises(BadSetting, match="needs a CPU with AVX2"):
        check_quantization("int8", CPU, BFLOAT16)


@pytest.mark.parametrize(
    ("strategy", "least_gain"), [("channel", 1.5), ("tensor", 1.05), ("block", 1.0)]
)
@pytest.mark.parametrize("is_heavy", [False, True])
def test_fp8_loses_less_than_weights_that_are_rounded_anyhow(
    strategy: Literal["tensor", "channel", "block"], least_gain: float, is_heavy: bool
) -> None:
    """The steps of int8 are those of FP8, wherever that is nearer."""
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    values[7] = 0
    given = values**3 if is_heavy else values
    tensors, meant = fp8(strategy, (32, 128)).store(given)
    groups = torch.arange(512) // (128 if strategy == "block" else 512)
    scales = tensors["weight_scale"].float()
    height = {"tensor": 64, "channel": 1, "block": 32}[strategy]
    spread = scales.reshape(-1, int(groups.max()) + 1).repeat_interleave(height, 0)
    weight = Fp8Weight(tensors["weight"], spread, groups)
    assert weight.dequantized().equal(meant)
    chosen = scales_of_fp8(weight, meant)
    least = quantize(meant)[1]
    assert (meant.abs().amax(1) <= 127.001 * chosen).all(), "no value overflows"
    found, plain = (rounding_error(meant, scales) for scales in (chosen, least))
    assert found.sum() <= 1.01 * plain.sum()
    if not is_heavy:
        assert found.sum().sqrt() * least_gain <= plain.sum().sqrt()
