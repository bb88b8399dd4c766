"""Products with packed weights on a card return what the dequantized weights return."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from compute.quantized_weights import QuantizedTensor
from compute.triton_kernels import packed_product
from compute.triton_kernels.fp8 import CardFp8Linear, pack_fp8
from compute.triton_kernels.int4 import CardInt4Linear, pack_int4
from compute.triton_kernels.packed_kernels import unpacked
from compute.triton_kernels.packed_product import PackedProduct, tiles_per_split
from compute.triton_kernels.tiling import ONE_GROUP, tiled
from tests.kernels import DEVICE, DTYPES
from tests.kernels.quantized_cases import fp8_weight, in_order, int4_weight, random_for, shuffled

# The interpreter computes by numpy, which warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
KINDS = [(CardInt4Linear, int4_weight), (CardFp8Linear, fp8_weight)]
Kind = tuple[type[CardInt4Linear | CardFp8Linear], Callable[[int, Tensor], QuantizedTensor]]


@pytest.fixture(params=KINDS, ids=["int4", "fp8"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=random_for(*shape)).to(DEVICE, dtype)


def check(
    product: PackedProduct,
    weight: QuantizedTensor,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    expected = x.cpu().double() @ weight.dequantized().double().T
    expected += 0 if bias is None else bias.cpu().to(x.dtype).double()
    expected += 0 if residual is None else residual.cpu().double()
    found = product(x, residual)
    assert found.dtype is x.dtype and found.shape == expected.shape
    size = expected.abs().max().item()
    torch.testing.assert_close(
        found.cpu().double(), expected, rtol=0, atol=TOLERANCE[x.dtype] * size
    )


@pytest.mark.parametrize("num_rows", [1, 8, 9, 17, 33])
def test_any_number_of_rows(kind: Kind, dtype: torch.dtype, num_rows: int) -> None:
    make, weigh = kind
    weight = weigh(70, in_order(192, 128))
    bias = random(70, dtype=torch.float32)
    product = make(weight, bias, dtype, DEVICE)
    check(product, weight, random(num_rows, 192, dtype=dtype), bias)


@pytest.mark.parametrize(
    "groups",
    [
        in_order(256, 128),
        in_order(160, 32),
        in_order(320, 128, first=64),
        in_order(96, 40),
        in_order(50, 64),
        in_order(31, 31),
        torch.zeros(100, dtype=torch.int64),
        in_order(160, 64) * 2 + 1,
        shuffled(in_order(200, 64)),
        shuffled(in_order(256, 128)),
    ],
    ids=[
        "of 128",
        "of 32",
        "begun before",
        "of 40",
        "fewer inputs than a group",
        "odd",
        "one",
        "not all used",
        "in any order, unequal",
        "in any order",
    ],
)
def test_any_groups(kind: Kind, dtype: torch.dtype, groups: Tensor) -> None:
    make, weigh = kind
    weight = weigh(66, groups)
    residual = random(2, 66, dtype=dtype)
    product = make(weight, None, dtype, DEVICE)
    check(product, weight, random(2, len(groups), dtype=dtype), residual=residual)
    many_rows = random(packed_product.MAX_KERNEL_ROWS + 1, len(groups), dtype=dtype)
    check(product, weight, many_rows, residual=random(len(many_rows), 66, dtype=dtype))


def test_a_product_of_many_inputs_is_split(kind: Kind, dtype: torch.dtype) -> None:
    make, weigh = kind
    weight = weigh(65, in_order(9 * 128, 128))
    bias = random(65, dtype=torch.float32)
    product = make(weight, bias, dtype, DEVICE)
    assert product._num_splits == 2 and product._tiles_per_split == 5
    x = random(3, 9 * 128, dtype=dtype)
    residual = random(3, 65, dtype=dtype)
    check(product, weight, x, bias, residual)
    assert torch.equal(product(x, residual), product(x, residual))


def test_rows_do_not_mix(kind: Kind, dtype: torch.dtype) -> None:
    """What is not finite stays in its row, and a row does not depend on the others."""
    make, weigh = kind
    weight = weigh(64, in_order(1024, 128))
    product = make(weight, None, dtype, DEVICE)
    x = random(5, 1024, dtype=dtype)
    alone = product(x[2:3])
    x[1, 7] = torch.nan
    x[3, 900] = torch.inf
    found = product(x)
    assert torch.equal(found[2:3], alone)
    assert found[1].isnan().all() and not found[3].isfinite().any()
    assert found[[0, 4]].isfinite().all()


def test_no_rows(kind: Kind, dtype: torch.dtype) -> None:
    make, weigh = kind
    product = make(weigh(66, in_order(64, 32)), None, dtype, DEVICE)
    assert product(random(0, 64, dtype=dtype)).shape == (0, 66)


def test_rows_that_lie_apart(kind: Kind, dtype: torch.dtype) -> None:
    make, weigh = kind
    weight = weigh(64, in_order(96, 32))
    room = random(3, 200, dtype=dtype)
    check(make(weight, None, dtype, DEVICE), weight, room[:, 1:97])
    check(make(weight, None, dtype, DEVICE), weight, random(96, 3, dtype=dtype).T)


def test_parts_of_ranks_add_up(kind: Kind) -> None:
    make, weigh = kind
    weight = weigh(64, in_order(384, 128))
    x = random(2, 384, dtype=torch.float32)
    total = torch.zeros(2, 64, device=DEVICE)
    for start, stop in pairwise((0, 96, 192, 384)):
        part = type(weight)(
            **{name: getattr(weight, name) for name in type(weight).__slots__}
            | {"values": weight.values[:, start:stop], "groups": weight.groups[start:stop]}
        )
        total += make(part, None, torch.float32, DEVICE)(x[:, start:stop])
    expected = x.cpu() @ weight.dequantized().T
    torch.testing.assert_close(
        total.cpu(), expected, rtol=0, atol=4e-6 * expected.abs().max().item()
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_unpacked_to_bfloat16(bits: int) -> None:
    """The interpreter cannot compute with bfloat16, but unpacking is a matter of bits."""
    values = torch.randint(2**bits, (64, 128), generator=random_for(bits), dtype=torch.uint8)
    if bits == 4:
        words = pack_int4(values)
        expected = (values.int() + 16).bfloat16()
    else:
        values[values & 0x7F == 0x7F] = 0
        words = pack_fp8(values)
        expected = (values.view(torch.float8_e4m3fn).float() * 2.0**-120).bfloat16()
    found = torch.empty(64, 128, dtype=torch.int16, device=DEVICE)
    unpack_kernel[(1,)](words.to(DEVICE), found, 128, bits, tl.bfloat16)
    assert torch.equal(found.cpu(), expected.view(torch.int16))


@triton.jit
def unpack_kernel(words, out, TILE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Write what `unpacked` returns for 64 outputs of one tile."""
    num_words = TILE * BITS // 32
    output = tl.arange(0, 64)[:, None]
    read = tl.load(words + output * num_words + tl.arange(0, TILE * BITS // 32)[None, :])
    bits = unpacked(read, TILE, BITS, dtype)
    tl.store(out + output * TILE + tl.arange(0, TILE)[None, :], bits)


@pytest.mark.parametrize("size", [2.0**-30, 2.0**30])
def test_scales_of_any_size(kind: Kind, size: float) -> None:
    make, weigh = kind
    weight = weigh(64, in_order(64, 32))
    weight.scales.mul_(size)
    check(make(weight, None, torch.float32, DEVICE), weight, random(2, 64, dtype=torch.float32))


def test_scales_may_be_zero(kind: Kind) -> None:
    make, weigh = kind
    weight = weigh(64, in_order(64, 32))
    weight.scales.zero_()
    product = make(weight, None, torch.float32, DEVICE)
    assert not product(random(2, 64, dtype=torch.float32)).any()


@pytest.mark.parametrize(
    ("num_blocks", "num_tiles", "expected"),
    [(592, 28, 28), (72, 28, 4), (56, 28, 4), (56, 148, 11), (1, 3, 3), (400, 100, 100)],
)
def test_a_split_suits_the_card(num_blocks: int, num_tiles: int, expected: int) -> None:
    assert tiles_per_split(num_blocks, num_tiles) == expected


@pytest.mark.parametrize(
    ("groups", "tile", "is_natural", "num_tiles", "regularity"),
    [
        (in_order(1024, 128), 128, True, 8, (1, 0)),
        (in_order(1000, 128), 128, True, 8, (1, 0)),
        (in_order(448, 128, first=64), 64, True, 7, (2, 1)),
        (in_order(448, 128, first=96), 32, True, 14, (4, 3)),
        (in_order(128, 32), 32, True, 4, (1, 0)),
        (torch.zeros(100, dtype=torch.int64), 128, True, 1, (ONE_GROUP, 0)),
        (in_order(448, 128, first=100), 32, False, 15, (4, 3)),
        (shuffled(in_order(2048, 128)), 128, False, 16, (1, 0)),
        (shuffled(in_order(2048, 128))[:1024], 32, False, 40, (0, 0)),
    ],
)
def test_tiles_suit_the_groups(
    groups: Tensor, tile: int, is_natural: bool, num_tiles: int, regularity: tuple[int, int]
) -> None:
    tiling = tiled(groups)
    assert (tiling.tile, tiling.is_natural, tiling.num_tiles) == (tile, is_natural, num_tiles)
    assert tiling.regularity() == regularity
    placed = tiling.positions[tiling.positions < len(groups)]
    assert placed.sort().values.tolist() == list(range(len(groups)))


def test_memory(kind: Kind) -> None:
    make, weigh = kind
    groups = in_order(1024, 128)
    product = make(weigh(256, groups), None, torch.bfloat16, DEVICE)
    most = 0.27 if make is CardInt4Linear else 0.52
    assert product.num_bytes < most * 256 * 1024 * 2
