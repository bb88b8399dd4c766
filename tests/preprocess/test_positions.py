"""M-RoPE positions of any mix of text and images follow the rule, one token after the other."""

from hypothesis import given
from hypothesis import strategies as st

from services.preprocess.families.qwen2_5_vl import rope_positions


def slow_positions(
    token_ids: list[int], grids: list[tuple[int, int]], placeholder: int
) -> list[list[int]]:
    """Return the positions by following the rule one token after the other."""
    found: list[list[int]] = []
    remaining = list(grids)
    cell = 0
    start = 0
    for token_id in token_ids:
        if token_id != placeholder:
            found.append([start] * 3)
            start += 1
            continue
        rows, columns = remaining[0]
        found.append([start, start + cell // columns, start + cell % columns])
        cell += 1
        if cell == rows * columns:
            start += max(rows, columns)
            remaining.pop(0)
            cell = 0
    return [list(axis) for axis in zip(*found, strict=True)]


grids = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=5)


@given(grids, st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_positions_of_mixed_prompts_follow_the_rule(
    grids: list[tuple[int, int]], gaps: list[int]
) -> None:
    token_ids = [0] * gaps[0]
    offsets = []
    for (rows, columns), gap in zip(grids, gaps[1:], strict=False):
        offsets.append(len(token_ids))
        token_ids += [1] * (rows * columns) + [0] * gap
    token_ids.append(0)
    positions, rope_delta = rope_positions(len(token_ids), offsets, grids)
    assert positions.tolist() == slow_positions(token_ids, grids, 1)
    assert rope_delta == positions.max() + 1 - len(token_ids)


def test_positions_after_an_image_at_the_end_go_on_beyond_it() -> None:
    positions, rope_delta = rope_positions(7, [1], [(2, 3)])
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 2, 2, 2],
        [0, 1, 2, 3, 1, 2, 3],
    ]
    assert 7 + rope_delta == 4
