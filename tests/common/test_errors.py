"""A text from outside is cut before it is quoted, and says so."""

import pytest

from common.errors import shorten


@pytest.mark.parametrize("text", ["", "a model", "x" * 200])
def test_a_short_text_stays_as_it_is(text: str) -> None:
    assert shorten(text) == text


def test_a_long_text_is_cut_and_says_how_much_is_left_out() -> None:
    assert shorten("x" * 5_000_200) == "x" * 200 + "… (5,000,000 characters left out)"
    assert shorten("größer", most=3) == "grö… (3 characters left out)"
