"""The steps that a card is timed with, and what they need at least, for a small model."""

from benchmarks.gpu.counts import decode_bytes, plan_of, prefill_operations, vision_operations
from common.checkpoint import open_checkpoint
from tests.golden import GoldenCase

CHECKPOINT = open_checkpoint(GoldenCase("a_image").checkpoint)


def test_sequences_of_a_plan_end_where_their_context_does() -> None:
    plan = plan_of([1, 3], context_len=10, block_size=4)
    assert plan.block_tables.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert plan.slot_mapping.tolist() == [9, 19, 20, 21]
    assert plan.positions.tolist() == [[9, 7, 8, 9]] * 3 and plan.sampled_rows.tolist() == [0, 3]


def test_what_is_read_and_computed_is_counted_by_shape() -> None:
    """4 layers of 128, an MLP of 256, 4 heads and 2 key heads of 32; a tower of 4 blocks of 64 with
    a merger of 256."""
    layer = (128 + 2 * 64 + 128) * 128 + 3 * 256 * 128
    head = 544 * 128
    assert (
        decode_bytes(CHECKPOINT, batch=3, context_len=10)
        == 2 * (4 * layer + head) + 3 * 10 * 4 * 2 * 64 * 2
    )
    assert prefill_operations(CHECKPOINT, 10) == 2 * 10 * 4 * layer + 4 * 2 * 10 * 10 * 128
    vision = CHECKPOINT.vision_config
    inner = vision["intermediate_size"]
    full = len(vision["fullatt_block_indexes"])
    window = (vision["window_size"] // vision["patch_size"]) ** 2
    block = (3 * 64 + 64 + 3 * inner) * 64
    merger = 256 * 256 + 128 * 256
    attention = 4 * 80 * 64 * (full * 80 + (4 - full) * window)
    assert (
        vision_operations(CHECKPOINT, 80)
        == 2 * 80 * (4 * block + 588 * 64) + 2 * 20 * merger + attention
    )
