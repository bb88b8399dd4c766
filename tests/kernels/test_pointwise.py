"""The kernels between the products return what torch returns, and touch nothing else."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from compute.kernels import operations
from compute.kernels.library import portable
from compute.triton_kernels import interpreted, pointwise
from tests.kernels import DTYPES, HAS_CARD

# The interpreter computes by numpy, which warns of what is not finite.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("tensors_are_on_the_card"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EPS = 1e-3
BLOCK_SIZE = 4
NUM_BLOCKS = 6


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def rows_apart(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor whose rows lie apart from each other, with NaN between them."""
    room = torch.full((shape[0], *shape[1:-1], shape[-1] + 3), torch.nan, dtype=dtype)
    room[..., : shape[-1]] = random(*shape, dtype=dtype)
    return room[..., : shape[-1]]


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), EPS)


@pytest.mark.parametrize("width", [1, 16, 50, 520])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_the_norm_of_a_sum_is_that_of_the_rounded_sum(
    num_rows: int, width: int, dtype: torch.dtype
) -> None:
    x = rows_apart(num_rows, width, dtype=dtype)
    delta = rows_apart(num_rows, width + 1, dtype=dtype)[:, 1:]
    weight = random(width, dtype=dtype)
    kept = x.clone()
    total, found = pointwise.add_rms_norm(x, delta, weight, EPS)
    assert total.equal(x + delta) and x.equal(kept)
    assert_near(found, normed(total, weight))
    if dtype is torch.float16 and not torch.cuda.is_available():
        # The roots of a card are less precise.
        assert found.equal(normed(total, weight).half())


@pytest.mark.parametrize("width", [1, 50, 520])
def test_a_norm_without_a_sum(width: int, dtype: torch.dtype) -> None:
    x = rows_apart(2, width, dtype=dtype)
    weight = random(width, dtype=dtype)
    total, found = pointwise.add_rms_norm(x, None, weight, EPS)
    assert total is x
    assert_near(found, normed(x, weight))


def test_rows_may_be_columns_of_another_tensor() -> None:
    x = random(20, 3).T
    weight = random(20)
    for delta in (None, random(20, 3).T):
        total, found = pointwise.add_rms_norm(x, delta, weight, EPS)
        assert_near(found, normed(total, weight))
    gate, up = x.chunk(2, -1)
    assert_near(pointwise.silu_mul(x), F.silu(gate) * up)


def test_a_row_of_zeros_has_a_norm() -> None:
    assert not pointwise.add_rms_norm(torch.zeros(1, 5), None, torch.ones(5), EPS)[1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x = random(3, 12)
    x[1, 4] = bad
    weight = random(6)
    delta = random(3, 6)
    total, found = pointwise.add_rms_norm(x[:, :6], delta, weight, EPS)
    assert_near(found, normed(x[:, :6] + delta, weight))
    assert_near(total, x[:, :6] + delta)
    gate, up = x.chunk(2, -1)
    assert_near(pointwise.silu_mul(x), F.silu(gate) * up)


@pytest.mark.parametrize("width", [1, 24, 1023, 1025])
@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_gate(num_rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = 9 * rows_apart(num_rows, 2 * width, dtype=dtype)
    gate, up = gate_up.float().chunk(2, -1)
    assert_near(pointwise.silu_mul(gate_up), F.silu(gate) * up)


def test_a_gate_far_below_zero_is_shut() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 3.0, 3.0, 3.0]])
    assert_near(pointwise.silu_mul(gate_up), torch.tensor([[0.0, 0.0, 270.0]]))


def turned(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Return x [n, heads, dim] turned, float32. The tables need not be those of one angle."""
    half = x.shape[-1] // 2
    behind = torch.cat((x[..., half:], x[..., :half]), -1).float()
    return x.float() * cos[:, None] + behind * signed_sin[:, None]


@pytest.mark.parametrize("num_heads", [1, 8, 9])
@pytest.mark.parametrize("dim", [2, 16, 20])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_rotate(num_rows: int, dim: int, num_heads: int, dtype: torch.dtype) -> None:
    heads = rows_apart(num_rows, num_heads + 2, dim, dtype=dtype)
    before = heads.clone()
    cos, signed_sin = random(2, num_rows, dim)
    pointwise.rotate(heads, num_heads, cos, signed_sin)
    assert_near(heads[:, :num_heads], turned(before[:, :num_heads], cos, signed_sin))
    assert heads[:, num_heads:].equal(before[:, num_heads:])


def new_cache(num_kv_heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the cache of the second of two layers, of a model whose cache has NaN everywhere."""
    shape = (2, 2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, dim)
    return torch.full(shape, torch.nan, dtype=dtype)[1]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 2), (7, 1), (9, 3)])
@pytest.mark.parametrize("dim", [8, 20])
@pytest.mark.parametrize("slots", [[3], [4, 23, 0, 7], []], ids=str)
def test_rotate_and_store(
    slots: list[int], dim: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    qkv = rows_apart(len(slots), num_heads + 2 * num_kv_heads, dim, dtype=dtype)
    before = qkv.clone()
    num_turning = num_heads + num_kv_heads
    cos, signed_sin = random(2, len(slots), dim)
    cache = new_cache(num_kv_heads, dim, dtype)
    where = torch.tensor(slots, dtype=torch.int64)
    pointwise.rotate_and_store(qkv, num_heads, num_kv_heads, cos, signed_sin, cache, where)
    assert_near(qkv[:, :num_turning], turned(before[:, :num_turning], cos, signed_sin))
    assert qkv[:, num_turning:].equal(before[:, num_turning:])
    keys, values = cache.flatten(1, 2)
    assert keys[where].equal(qkv[:, num_heads:num_turning])
    assert values[where].equal(qkv[:, num_turning:])
    others = torch.ones(len(keys), dtype=torch.bool).index_fill(0, where, False)
    assert keys[others].isnan().all() and values[others].isnan().all()


def test_a_cache_may_have_any_strides() -> None:
    """Another layout of the same cache: the heads of a block lie together."""
    cache = torch.zeros(2, NUM_BLOCKS, 3, BLOCK_SIZE, 8).transpose(2, 3)
    qkv = random(2, 4 + 6, 8)
    tables = random(2, 2, 8)
    pointwise.rotate_and_store(qkv, 4, 3, *tables, cache, torch.tensor([9, 6]))
    for row, slot in enumerate((9, 6)):
        k, v = cache[:, slot // BLOCK_SIZE, slot % BLOCK_SIZE]
        assert k.equal(qkv[row, 4:7]) and v.equal(qkv[row, 7:])


def test_rows_that_are_not_finite_turn_alone() -> None:
    qkv = random(3, 4, 8)
    qkv[1] = torch.nan
    qkv[2, 3] = torch.inf
    cache = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, 1, 8)
    pointwise.rotate_and_store(qkv, 2, 1, *random(2, 3, 8), cache, torch.tensor([2, 3, 4]))
    assert qkv[0].isfinite().all() and qkv[1].isnan().all() and qkv[2, :3].isfinite().all()
    assert cache[0, 0, 3].isnan().all() and cache[1, 1, 0].isinf().all()
    assert cache.flatten(1, 2)[:, [0, 1, 2, 5]].isfinite().all()


CALLS: dict[str, Any] = {
    "rms_norm": lambda: operations.rms_norm(random(2, 8), random(8), EPS),
    "add_rms_norm": lambda: operations.add_rms_norm(random(2, 8), random(2, 8), random(8), EPS)[1],
    "silu_mul": lambda: operations.silu_mul(random(2, 8)),
    "rotate": lambda: rotated(operations.rotate),
    "rotate_and_store": lambda: rotated_and_stored(),
}


def rotated(rotate: Any) -> Tensor:
    heads = random(2, 3, 8)
    rotate(heads, 2, *random(2, 2, 8))
    return heads


def rotated_and_stored() -> Tensor:
    cache = torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, 1, 8)
    operations.rotate_and_store(
        random(2, 4, 8), 2, 1, *random(2, 2, 8), cache, torch.tensor([5, 1])
    )
    return cache


@pytest.mark.parametrize("name", CALLS)
def test_operations_use_the_kernels_where_they_serve(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with portable():
        expected = CALLS[name]()
    with interpreted():
        assert operations.adds_with_norm(expected)
        assert_near(CALLS[name](), expected)
        with portable():
            assert not operations.adds_with_norm(expected)
    for kernel in ("add_rms_norm", "silu_mul", "rotate", "rotate_and_store"):
        monkeypatch.delattr(pointwise, kernel)
    assert HAS_CARD or CALLS[name]().equal(expected)
    with interpreted():
        with portable():
            assert CALLS[name]().equal(expected)
        with pytest.raises(AttributeError):
            CALLS[name]()


def far_apart(num_rows: int, *shape: int) -> Tensor:
    """Return rows so far apart that the last ones are beyond the reach of 32 bits.

    Nothing between them is touched, so it takes no memory.
    """
    stride = 2**30
    room = torch.empty((num_rows - 1) * stride + math.prod(shape), dtype=torch.float16)
    inner = torch.empty(shape).stride()
    return room.as_strided((num_rows, *shape), (stride, *inner)).copy_(random(num_rows, *shape))


def test_offsets_have_64_bits() -> None:
    x = far_apart(3, 6)
    near = x.contiguous()
    assert_near(pointwise.silu_mul(x), pointwise.silu_mul(near))
    weight = torch.ones(6, dtype=torch.float16)
    found = pointwise.add_rms_norm(x, x, weight, EPS)
    for one, other in zip(found, pointwise.add_rms_norm(near, near, weight, EPS), strict=True):
        assert one.equal(other)
    heads = far_apart(3, 3, 2)
    cache = far_apart(3, 2, 1, 1, 2).transpose(0, 1)
    near = heads.contiguous()
    near_cache = torch.zeros(2, 3, 1, 1, 2, dtype=torch.float16)
    tables = random(2, 3, 2)
    for qkv, stored in ((heads, cache), (near, near_cache)):
        pointwise.rotate_and_store(qkv, 1, 1, *tables, stored, torch.tensor([2, 0, 1]))
    assert heads.equal(near) and cache.equal(near_cache)


def test_nothing_is_written_behind_a_row() -> None:
    x = random(2, 6)
    room = torch.zeros(3, 2 * 6 + 4096)
    normed, total, gated = room
    pointwise.add_rms_norm_kernel[(2,)](
        x, x, x, total, normed, 6, 6, 6, EPS, HAS_DELTA=True, BLOCK=8
    )
    pointwise.silu_mul_kernel[(2, 1)](x, gated, 6, 3, BLOCK=8)
    assert normed[:12].all() and total[:12].all() and gated[:6].all()
    assert not room[:2, 12:].any() and not gated[6:].any()
