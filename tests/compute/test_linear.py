"""A product with weights laid out at load equals the plain one, by whichever kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compute.kernels.library import bfloat16_kernels
from compute.linear import Linear, can_pack, kernels_for_packed, max_kernel_rows

needs_kernels = pytest.mark.skipif(
    bfloat16_kernels() is None, reason="no kernels for this CPU, or no compiler"
)
ROWS = (0, 1, 3, 6, 7, 13, 64, 65, 200)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return (
        float(((found.float() - expected).abs() / (expected.abs() + 1)).max())
        if found.numel()
        else 0.0
    )


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(64, 32), (100, 588), (33, 31), (1152, 896), (40, 4864)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.002)],
)
def test_it_equals_the_plain_product(
    num_outputs: int, num_inputs: int, dtype: torch.dtype, tolerance: float
) -> None:
    weight = random(num_outputs, num_inputs, dtype=dtype) * num_inputs**-0.5
    bias = random(num_outputs, dtype=dtype)
    linear = Linear(weight, bias)
    without_bias = Linear(weight)
    for num_rows in ROWS:
        x = random(num_rows, num_inputs, dtype=dtype)
        residual = random(num_rows, num_outputs, dtype=dtype)
        product = F.linear(x.float(), weight.float())
        assert relative_error(linear(x), product + bias.float()) < tolerance
        assert relative_error(without_bias(x), product) < tolerance
        assert (
            relative_error(linear(x, residual), product + bias.float() + residual.float())
            < tolerance
        )


@needs_kernels
@pytest.mark.parametrize("num_inputs", [896, 2500])
def test_a_row_does_not_depend_on_those_beside_it(num_inputs: int) -> None:
    linear = Linear(random(200, num_inputs, dtype=torch.bfloat16))
    x = random(max_kernel_rows(), num_inputs, dtype=torch.bfloat16)
    together = linear(x)
    for num_rows in (1, 2, 5, 6, 7, 16):
        assert linear(x[:num_rows]).equal(together[:num_rows])


@needs_kernels
def test_rows_may_lie_apart() -> None:
    linear = Linear(random(70, 64, dtype=torch.bfloat16))
    x = random(5, 3, 64, dtype=torch.bfloat16)
    assert linear(x[:, 1]).equal(linear(x[:, 1].contiguous()))


@needs_kernels
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 32), (130, 100), (33, 66)])
def test_rows_of_packed_weights_are_those_given(num_outputs: int, num_inputs: int) -> None:
    weight = random(num_outputs, num_inputs, dtype=torch.bfloat16)
    packed = Linear(weight).packed
    outputs = torch.tensor([[num_outputs - 1, 0], [17, 16], [5, 5]]).T[0]
    assert packed is not None and packed.rows(outputs).equal(weight[outputs])


@needs_kernels
def test_threads_do_not_change_the_result() -> None:
    linear = Linear(random(500, 128, dtype=torch.bfloat16))
    x = random(9, 128, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    alone = linear(x)
    torch.set_num_threads(3)
    try:
        assert linear(x).equal(alone)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_what_is_no_number_stays_none() -> None:
    x = random(2, 64, dtype=torch.bfloat16)
    x[1, 7] = torch.nan
    found = Linear(random(10, 64, dtype=torch.bfloat16))(x)
    assert found[0].isfinite().all() and found[1].isnan().all()


@needs_kernels
@pytest.mark.skipif(
    not can_pack(torch.bfloat16),
    reason="oneDNN packs no bfloat16 here: the kernels do it themselves",
)
def test_packed_weights_lie_as_the_kernels_read_them() -> None:
    """Where another version of oneDNN packs otherwise this fails, and few rows are slow: the
    kernels must follow it."""
    assert kernels_for_packed() is not None
