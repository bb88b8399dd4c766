"""Products with weights of four bits equal those with what these weights mean."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compute.int4_linear import Int4Linear, arranged
from compute.kernels.library import int8_kernels
from compute.products import product_of
from compute.quantized_weights import Int4Weight
from tests.compute.test_linear import random, relative_error

needs_kernels = pytest.mark.skipif(int8_kernels() is None, reason="no AVX2, or no compiler")
BFLOAT16 = torch.bfloat16
ROWS = (0, 1, 2, 3, 6, 7, 16, 49, 101, 230)


def weight_of(num_outputs: int, groups: Tensor) -> Int4Weight:
    """Random weights near one divided by the root of the number of inputs; all zeros occur."""
    chance = torch.Generator().manual_seed(num_outputs + len(groups))
    num_groups = int(groups.max()) + 1
    scales = 0.5 + torch.rand(num_outputs, num_groups, generator=chance)
    return Int4Weight(
        torch.randint(16, (num_outputs, len(groups)), generator=chance).to(torch.uint8),
        scales * 0.1 * len(groups) ** -0.5,
        torch.randint(17, (num_outputs, num_groups), generator=chance).to(torch.uint8),
        groups,
    )


def groups_of(num_inputs: int, size: int, skipped: int = 0) -> Tensor:
    """Groups of this size, the first of which lacks its first `skipped` inputs."""
    return (torch.arange(num_inputs) + skipped) // size


def by_activation(num_inputs: int, size: int) -> Tensor:
    """The same groups, whose inputs a checkpoint sorted."""
    order = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(0))
    return groups_of(num_inputs, size)[order]


@needs_kernels
@pytest.mark.parametrize(
    ("num_outputs", "groups"),
    [
        (64, groups_of(128, 128)),
        (100, groups_of(256, 32)),
        (33, groups_of(31, 64)),
        (1152, groups_of(896, 64)),
        (130, groups_of(1000, 128, skipped=40)),
        (70, groups_of(300, 32, skipped=5)),
        (96, groups_of(9000, 9000)),
        (70, by_activation(700, 64)),
        (70, by_activation(1001, 128)),
        (40, groups_of(400, 100) + 3),
    ],
    ids=["128", "32", "odd", "64", "cut", "cut oddly", "one", "sorted", "sorted odd", "later"],
)
def test_a_product_equals_that_of_the_dequantised_weights(num_outputs: int, groups: Tensor) -> None:
    weight = weight_of(num_outputs, groups)
    meant = weight.dequantized()
    bias = random(num_outputs, dtype=BFLOAT16)
    linear = Int4Linear(weight, bias)
    without_bias = Int4Linear(weight)
    for num_rows in ROWS:
        x = random(num_rows, len(groups), dtype=BFLOAT16)
        residual = random(num_rows, num_outputs, dtype=BFLOAT16)
        product = F.linear(x.float(), meant)
        assert relative_error(without_bias(x), product) < 0.004
        assert (
            relative_error(linear(x, residual), product + bias.float() + residual.float()) < 0.004
        )


@needs_kernels
def test_neither_rows_beside_it_nor_threads_change_a_row() -> None:
    linear = Int4Linear(weight_of(500, groups_of(9000, 128, skipped=40)))
    x = random(130, 9000, dtype=BFLOAT16)
    before = torch.get_num_threads()
    together = linear(x)
    torch.set_num_threads(3)
    try:
        for num_rows in (1, 2, 5, 16, 130):
            assert linear(x[:num_rows]).equal(together[:num_rows])
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("num_rows", [3, 60])
def test_a_row_that_is_not_finite_leaves_the_others_alone(value: float, num_rows: int) -> None:
    linear = Int4Linear(weight_of(70, by_activation(300, 64)))
    x = random(num_rows, 300, dtype=BFLOAT16)
    expected = linear(x)
    x[1, 7] = value
    found = linear(x)
    others = torch.arange(num_rows) != 1
    assert found[others].equal(expected[others])
    assert not found[1].isfinite().any()


@needs_kernels
def test_rows_may_lie_apart() -> None:
    linear = Int4Linear(weight_of(70, groups_of(64, 32)))
    x = random(5, 3, 64, dtype=BFLOAT16)
    assert linear(x[:, 1]).equal(linear(x[:, 1].contiguous()))


@needs_kernels
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_scales_that_float16_does_not_hold_are_exact_enough(factor: float) -> None:
    weight = weight_of(40, groups_of(256, 32))
    small = Int4Weight(weight.values, weight.scales * factor, weight.zeros, weight.groups)
    x = random(3, 256, dtype=BFLOAT16)
    assert Int4Linear(small)(x).equal((Int4Linear(weight)(x).float() * factor).bfloat16())


@needs_kernels
def test_a_cpu_multiplies_such_weights_as_they_are() -> None:
    weight = weight_of(40, groups_of(256, 32))
    assert isinstance(product_of(weight, None, BFLOAT16), Int4Linear)


@needs_kernels
def test_weights_take_little_more_than_four_bits() -> None:
    packed = Int4Linear(weight_of(1024, groups_of(1024, 128))).packed
    assert packed.num_bytes < 0.27 * 2 * 1024 * 1024


@pytest.mark.parametrize("groups", [groups_of(300, 128, skipped=20), by_activation(77, 16)])
def test_pieces_hold_each_input_once_together_with_others_of_its_group(groups: Tensor) -> None:
    pieces, group_of, order = arranged(groups)
    assert sorted(order[order >= 0].tolist()) == list(range(len(groups)))
    assert pieces[-1] * 8 == len(order)
    for piece, (first, last) in enumerate(pairwise(pieces.tolist())):
        inputs = order[8 * first : 8 * last]
        assert set(groups[inputs[inputs >= 0]].tolist()) == {int(group_of[piece])}
