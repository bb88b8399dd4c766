"""Paged attention in Triton equals attention written out."""

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compute.triton_kernels import attention_tiles, paged_attention
from compute.triton_kernels.attention_kernels import attend_splits, attend_tiles
from compute.triton_kernels.attention_tiles import Card, HeadParts, tile_of_decode, tile_of_queries
from compute.triton_kernels.paged_attention import Sequences, attend, count_splits
from tests.kernels import DTYPES, HAS_CARD
from tests.kernels.attention_cases import Case, assert_equal, int32

pytestmark = pytest.mark.usefixtures("tensors_are_on_the_card")
HALF = torch.float16
FLOAT = torch.float32
H100 = Card(num_multiprocessors=132, shared_memory=227 * 1024, major=9)
SMALL = Card(num_multiprocessors=8, shared_memory=99 * 1024, major=8)


@pytest.fixture(params=[1, 5], ids=lambda count: f"{count}-splits")
def num_splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(paged_attention, "count_splits", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((head_dim, DTYPES[-1]) for head_dim in (8, 64, 72, 80, 96, 104, 128, 256)),
        *((head_dim, dtype) for head_dim in (72, 128) for dtype in DTYPES[:-1]),
    ],
)
@pytest.mark.parametrize("query_lens", [[1, 1], [1, 3]])
def test_every_head_size(query_lens: list[int], head_dim: int, dtype: torch.dtype) -> None:
    case = Case.of(query_lens, [70, 17], num_heads=1, head_dim=head_dim, dtype=dtype)
    assert_equal(case, case.computed())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 104])
def test_every_head_size_in_splits(head_dim: int, num_splits: int) -> None:
    case = Case.of([1, 1], [150, 3], head_dim=head_dim)
    assert_equal(case, case.computed())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (14, 2), (8, 1), (20, 1)])
@pytest.mark.parametrize("query_lens", [[1, 1], [4, 1]])
def test_every_group(
    query_lens: list[int], num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    case = Case.of(query_lens, [40, 9], num_heads, num_kv_heads, dtype=dtype)
    assert_equal(case, case.computed())


@pytest.mark.parametrize(
    ("block_size", "dtype"), [(16, HALF), (32, HALF), (32, FLOAT), (48, HALF), (128, HALF)]
)
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [2, 9, 16, 1]])
def test_the_edges_of_blocks(query_lens: list[int], block_size: int, dtype: torch.dtype) -> None:
    edges = [block_size - 1, block_size, block_size + 1, 2 * block_size]
    case = Case.of(query_lens, edges, block_size=block_size, dtype=dtype)
    assert_equal(case, case.computed())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_the_edges_of_tiles_in_splits(num_splits: int, block_size: int, dtype: torch.dtype) -> None:
    case = Case.of([1] * 5, [1, 63, 64, 65, 321], 1, block_size=block_size, dtype=dtype)
    assert_equal(case, case.computed())


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([70], [70]), ([70], [200]), ([64, 1, 65], [64, 130, 66]), ([130, 3], [131, 190])],
)
def test_chunks_of_prompts(query_lens: list[int], context_lens: list[int]) -> None:
    case = Case.of(query_lens, context_lens)
    assert_equal(case, case.computed())


def test_a_chunk_of_seven_heads_to_a_key_head() -> None:
    """Tiles of 128 rows begin in the middle of a token's heads."""
    case = Case.of([40, 1], [90, 90], num_heads=7)
    assert_equal(case, case.computed())


def test_a_chunk_in_float32() -> None:
    case = Case.of([20, 5], [50, 70], num_heads=7, dtype=FLOAT)
    assert_equal(case, case.computed())


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 6, 2]])
def test_rows_between_the_sequences_stay(query_lens: list[int], num_splits: int) -> None:
    case = Case.of(query_lens, [70, 150, 9], gap=3)
    assert_equal(case, case.computed())


def test_queries_next_to_keys_and_values() -> None:
    """Queries may be a part of each token's row."""
    case = Case.of([1, 3], [70, 9], num_heads=4, num_kv_heads=2)
    qkv = torch.cat([case.q, torch.full_like(case.q, torch.nan)], 1)
    case = dataclasses.replace(case, q=qkv[:, :4])
    assert_equal(case, case.computed())


def test_the_longest_possible_context_is_an_upper_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A captured graph splits for it, so that most splits of short contexts are empty."""
    monkeypatch.setattr(attention_tiles, "INTERPRETER", SMALL)
    case = Case.of([1, 1, 1], [1, 70, 200])
    assert_equal(case, case.computed(max_context=4096))


@pytest.mark.parametrize("query_lens", [[1, 1], [3, 1]])
def test_scaled_queries(query_lens: list[int], num_splits: int) -> None:
    case = Case.of(query_lens, [150, 20], gap=1)
    factors = torch.linspace(0.5, 2.5, len(case.q))
    scaled = dataclasses.replace(case, scale=factors)
    assert_equal(scaled, scaled.computed())


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 2, 3]])
def test_a_sequence_with_nan_is_alone_with_it(query_lens: list[int], num_splits: int) -> None:
    case = Case.of(query_lens, [70, 150, 9])
    case.keys[1][100] = torch.nan
    computed = case.computed()
    assert_equal(case, computed)
    first = query_lens[0]
    assert computed[first : first + query_lens[1]].isnan().all() and computed.isnan().sum() < 200


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 2, 3]])
def test_a_query_of_nan_is_alone_with_it(query_lens: list[int], num_splits: int) -> None:
    case = Case.of(query_lens, [70, 150, 9])
    case.q[1, 1] = torch.nan
    computed = case.computed()
    assert_equal(case, computed)
    assert computed.isnan().sum() == 16


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("first_bad", [0, 70, 149])
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
@pytest.mark.parametrize("query_lens", [[1, 1], [2, 1]])
def test_infinite_scores(
    query_lens: list[int], infinity: float, first_bad: int, num_splits: int
) -> None:
    """Minus infinity hides a key, and only what sees no key at all has no result."""
    case = Case.of(query_lens, [150, 20])
    case.q[..., 0] = 1
    case.keys[0][first_bad:, 0, 0] = infinity
    assert_equal(case, case.computed())


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("query_lens", [[1], [2]])
def test_caches_with_more_numbers_than_32_bits_count(
    query_lens: list[int], block_size: int
) -> None:
    """Most of its memory is never touched."""
    case = Case.of(query_lens, [20], num_heads=1, head_dim=64)
    block = 2**31 // (block_size * 64) + 5
    cache = torch.empty(2, block + 1, block_size, 1, 64, dtype=HALF)
    cache[0, block, :20] = case.keys[0]
    cache[1, block, :20] = case.values[0]
    sequences = Sequences(
        int32([0]), int32(query_lens), int32([20]), int32([[block]]), query_lens[0], 20
    )
    out = torch.empty_like(case.q)
    attend(case.q, cache, sequences, out)
    assert_equal(case, out.float())


@pytest.mark.parametrize(
    ("kernel", "numbers"),
    [(attend_tiles, {"table_stride"}), (attend_splits, {"table_stride", "num_splits"})],
)
def test_kernels_are_not_compiled_again_for_other_steps(kernel: Any, numbers: set[str]) -> None:
    options = vars(kernel) if HAS_CARD else kernel.kwargs
    assert set(options["do_not_specialize"]) == numbers


def test_no_sequences() -> None:
    case = Case.of([1], [3])
    none = int32([])
    out = torch.empty_like(case.q)
    cache = torch.zeros(2, 1, 16, 1, 16, dtype=HALF)
    attend(case.q, cache, Sequences(none, none, none, none.view(0, 1), 1, 1), out)


@pytest.mark.parametrize("card", [H100, SMALL])
@pytest.mark.parametrize("head_dim", [64, 80, 104, 128, 256])
@pytest.mark.parametrize("rows", [7, 64, 4096])
def test_tiles_fit_into_shared_memory(rows: int, head_dim: int, card: Card) -> None:
    for tile in (
        tile_of_queries(head_dim, HALF, rows, card),
        tile_of_decode(head_dim, HALF, 7, card),
    ):
        stage = 2 * 2 * tile.keys * HeadParts.of(head_dim).width
        assert tile.num_stages == 1 or tile.num_stages * stage < card.shared_memory
    assert tile.num_stages > 1 or head_dim == 256


@pytest.mark.parametrize(
    ("head_dim", "keys"), [(64, 128), (80, 128), (96, 128), (104, 64), (128, 64)]
)
def test_two_tiles_are_loaded_while_one_is_computed_with(head_dim: int, keys: int) -> None:
    tile = tile_of_queries(head_dim, HALF, 4096, H100)
    assert (tile.rows, tile.keys, tile.num_stages) == (128, keys, 3)


@pytest.mark.parametrize(
    ("num_programs", "max_context", "expected"),
    [(4, 32768, 64), (4, 1024, 8), (4, 100, 1), (128, 32768, 3), (132, 32768, 2), (300, 32768, 1)],
)
def test_splits_fill_the_card(num_programs: int, max_context: int, expected: int) -> None:
    assert count_splits(num_programs, max_context, 64, H100) == expected


@pytest.mark.parametrize(
    ("head_dim", "main", "rest"),
    [
        (8, 16, 0),
        (24, 32, 0),
        (48, 32, 16),
        (72, 64, 16),
        (80, 64, 16),
        (96, 64, 32),
        (104, 128, 0),
        (112, 128, 0),
        (128, 128, 0),
        (256, 256, 0),
    ],
)
def test_parts_of_heads(head_dim: int, main: int, rest: int) -> None:
    assert HeadParts.of(head_dim) == HeadParts(main, rest)
