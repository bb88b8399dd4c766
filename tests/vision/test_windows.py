"""The windows of a grid hold every unit once."""

import pytest

from services.vision.windows import window_order


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (5, 7), (8, 8), (2, 13), (16, 9)])
def test_windows_hold_every_unit_once_and_none_crosses_a_border(height: int, width: int) -> None:
    order, windows = window_order(height, width, 4)
    assert sorted(order.tolist()) == list(range(height * width))
    assert len(windows) <= 4
    parts = order.split([units for count, units in windows for _ in range(count)])
    assert len(parts) == -(-height // 4) * -(-width // 4)
    for part in parts:
        assert len({(unit // width // 4, unit % width // 4) for unit in part.tolist()}) == 1
