"""Attention of whole sequences in Triton equals attention written out."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compute.triton_kernels.dense_attention import attend_sequences
from tests.kernels import DTYPES
from tests.kernels.attention_cases import int32, tolerance, written_out

pytestmark = pytest.mark.usefixtures("tensors_are_on_the_card")
HALF = torch.float16


def drawn(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(num_heads)
    return torch.randn(num_tokens, num_heads, head_dim, generator=draw).to(dtype)


def assert_attends(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool = False
) -> None:
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    computed = attend_sequences(q, k, v, int32(starts), max(lengths), causal)
    one = torch.ones(max(lengths))
    expected = [
        written_out(a, b, c, one[: len(a)], causal)
        for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    assert computed.is_contiguous() and computed.dtype == q.dtype
    torch.testing.assert_close(
        computed.float(), torch.cat(expected), rtol=0, atol=tolerance(q.dtype), equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[64, 64], [1, 63, 5], [65, 130]])
def test_sequences(lengths: list[int], causal: bool, dtype: torch.dtype) -> None:
    q, k, v = drawn(sum(lengths), 3, 16, dtype).split(1, 1)
    assert_attends(q, k, v, lengths, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 104, 128])
def test_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = drawn(70, 6, head_dim, dtype).split(2, 1)
    assert_attends(q, k, v, [64, 6])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 2, 7, 8])
def test_every_group(group: int, causal: bool) -> None:
    q, k, v = drawn(47, 2 * group + 4, 16, HALF).split([2 * group, 2, 2], 1)
    assert_attends(q, k, v, [40, 7], causal)


def test_keys_of_one_tensor_and_queries_of_another() -> None:
    """A rotation may leave queries and keys in memory of their own."""
    assert_attends(drawn(30, 4, 16, HALF), drawn(30, 2, 16, HALF), drawn(30, 2, 16, HALF), [9, 21])


@pytest.mark.parametrize("causal", [False, True])
def test_nan_stays_in_its_sequence(causal: bool) -> None:
    q, k, v = drawn(50, 3, 16, HALF).split(1, 1)
    k[20] = torch.nan
    v[45] = torch.nan
    assert attend_sequences(q, k, v, int32([0, 10, 40, 44, 50]), 30)[40:44].isfinite().all()
    assert_attends(q, k, v, [20, 1, 24, 5])


def test_sequences_of_nothing() -> None:
    q, k, v = drawn(10, 3, 16, HALF).split(1, 1)
    out = attend_sequences(q, k, v, int32([0, 4, 4, 10]), 6)
    assert out[4:].equal(attend_sequences(q[4:], k[4:], v[4:], int32([0, 6]), 6))
    assert len(attend_sequences(q[:0], k[:0], v[:0], int32([0]), 0)) == 0
