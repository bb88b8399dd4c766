"""What a model takes of memory, computed from its files alone."""

from math import prod

import pytest

from common.checkpoint import open_checkpoint
from common.families import ModelSizes
from common.sizing import Footprint, cache_bytes
from tests.golden import CASES, GoldenCase


@pytest.mark.parametrize("name", CASES)
def test_tower_and_language_model_are_the_whole_checkpoint(name: str) -> None:
    checkpoint = open_checkpoint(GoldenCase(name).checkpoint)
    sizes = Footprint(checkpoint, 2)
    assert sizes.vision_bytes + sizes.rank_bytes(1) == 2 * sum(
        prod(info.shape) for info in checkpoint.tensors.values()
    )
    assert 0 < sizes.vision_bytes < Footprint(checkpoint, 4).vision_bytes


def test_ranks_share_keys_and_values_as_far_as_there_are_heads() -> None:
    checkpoint = open_checkpoint(GoldenCase("c_gqa_tp8").checkpoint)
    num_kv_heads = checkpoint.sizes.num_kv_heads
    sizes = Footprint(checkpoint, 4)
    per_head = sizes.kv_bytes_per_token(num_kv_heads)
    assert sizes.kv_bytes_per_token(1) == num_kv_heads * per_head
    assert sizes.kv_bytes_per_token(8) == per_head
    assert 8 * sizes.rank_bytes(8) > sizes.rank_bytes(1), (
        "norms and shared key heads are on every rank"
    )


@pytest.mark.parametrize(
    ("counts", "num_kv_heads", "world_size", "fits"),
    [
        ((28, 18944, 152064), 4, 4, True),
        ((28, 18944, 152064), 4, 8, False),
        ((16, 64, 64), 2, 8, True),
        ((16, 64, 64), 3, 2, False),
        ((16, 64, 64), 0, 8, True),
    ],
)
def test_what_divides(
    counts: tuple[int, ...], num_kv_heads: int, world_size: int, fits: bool
) -> None:
    num_heads, intermediate_size, vocab_size = counts
    sizes = ModelSizes(vocab_size, 64, intermediate_size, 2, num_heads, num_kv_heads, 8)
    assert sizes.fits(world_size) == fits


def test_a_card_too_small_for_the_weights_has_no_cache() -> None:
    assert cache_bytes(1000, 300) == 500
    assert cache_bytes(1000, 900) == 0


def test_a_model_without_keys_and_values_needs_no_cache() -> None:
    sizes = ModelSizes(3129, 768, 3072, 12, 12, 0, 64)
    assert sizes.kv_bytes_per_token(2, 2) == 0
