"""M-RoPE positions of any mix of text, images and videos follow the rule, token by token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.preprocess.families.qwen2_5_vl import rope_positions

Grid = tuple[list[int], int, int]
"""When the steps of an item are, and its rows and columns."""


def slow_positions(token_ids: list[int], grids: list[Grid], placeholder: int) -> list[list[int]]:
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
        times, rows, columns = remaining[0]
        step, place = divmod(cell, rows * columns)
        row, column = divmod(place, columns)
        found.append([start + times[step], start + row, start + column])
        cell += 1
        if cell == len(times) * rows * columns:
            start += max(times[-1] + 1, rows, columns)
            remaining.pop(0)
            cell = 0
    return [list(axis) for axis in zip(*found, strict=True)]


times = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(
    lambda gaps: [0, *np.cumsum(gaps[1:]).tolist()]
)
grids = st.lists(st.tuples(times, st.integers(1, 6), st.integers(1, 6)), max_size=5)


@given(grids, st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_positions_of_mixed_prompts_follow_the_rule(grids: list[Grid], gaps: list[int]) -> None:
    token_ids = [0] * gaps[0]
    offsets = []
    for (times, rows, columns), gap in zip(grids, gaps[1:], strict=False):
        offsets.append(len(token_ids))
        token_ids += [1] * (len(times) * rows * columns) + [0] * gap
    token_ids.append(0)
    positions, rope_delta = rope_positions(
        len(token_ids),
        offsets,
        [(rows, columns) for _, rows, columns in grids],
        [np.array(times) for times, _, _ in grids],
    )
    assert positions.tolist() == slow_positions(token_ids, grids, 1)
    assert rope_delta == positions.max() + 1 - len(token_ids)


def test_positions_after_an_image_at_the_end_go_on_beyond_it() -> None:
    positions, rope_delta = rope_positions(7, [1], [(2, 3)], [np.zeros(1, np.int64)])
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 2, 2, 2],
        [0, 1, 2, 3, 1, 2, 3],
    ]
    assert 7 + rope_delta == 4
