"""Equations: found in Markdown, and compared as KaTeX renders them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.commands.evaluation.olmocr.equations import (
    Rendered,
    Symbol,
    find_equations,
    is_within,
)
from services.commands.evaluation.olmocr.katex import Katex, NoMath


@pytest.fixture(scope="module")
def katex() -> Iterator[Katex]:
    try:
        renderer = Katex()
    except NoMath as reason:
        pytest.skip(str(reason))
    with renderer:
        yield renderer


def row(text: str) -> Rendered:
    """Symbols in one row, without any structure."""
    return Rendered(text, [Symbol(c, 20.0 * i, 0.0, 10.0, 10.0) for i, c in enumerate(text)])


def test_equations_are_found_by_their_delimiters() -> None:
    text = r"a \( x \) b $$ y $$ c \[z\] d $w$ \(x\)"
    assert find_equations(text, with_dollars=True) == ["x", "x", "z", "y", "w"]
    assert find_equations(text, with_dollars=False) == ["x", "x", "z"]


@pytest.mark.parametrize(
    ("wanted", "found", "is_there"),
    [
        ("a+b", "xa+by", True),
        ("a+b", "a-b", False),
        ("a+b", "b+a", False),
        ("aba", "abcaba", True),
        ("aa", "a", False),
    ],
)
def test_symbols_in_a_row_are_found_in_their_order(wanted: str, found: str, is_there: bool) -> None:
    assert is_within(row(wanted), Rendered("", row(found).symbols)) == is_there


def test_a_symbol_above_is_not_one_to_the_right() -> None:
    def pair(x: float, y: float) -> list[Symbol]:
        return [Symbol("a", 0, 0, 10, 10), Symbol("b", x, y, 10, 10)]

    assert not is_within(Rendered("1", pair(0, -20)), Rendered("2", pair(20, 0)))
    assert is_within(Rendered("1", pair(0, -20)), Rendered("2", pair(3, -40)))


def test_neighbours_are_each_others() -> None:
    """Each symbol has the neighbours that are wanted, but in another shape."""

    def block(*places: tuple[int, int]) -> list[Symbol]:
        return [Symbol("a", 20.0 * x, 20.0 * y, 10.0, 10.0) for x, y in places]

    wanted = block((0, 2), (0, 1), (1, 0), (1, 1))
    assert not is_within(
        Rendered("1", wanted), Rendered("2", block((0, 0), (0, 2), (1, 0), (1, 2), (0, 1)))
    )
    assert is_within(Rendered("1", wanted), Rendered("2", block((0, 1), (0, 2), (1, 0), (1, 1))))


@pytest.mark.parametrize(
    ("wanted", "found", "is_there"),
    [
        (r"e^{i \pi}+1=0", r"e^{i\pi} + 1 = 0", True),
        (r"a^{2}+b^{2}=c^{2}", r"\begin{align*} a^2+b^2&=c^2 \\ q &= 1 \end{align*}", True),
        (r"T_{ij}^{kl}", r"T^{kl}_{ij}", True),
        (r"\left\{ x \right\}", r"\{x\}", True),
        (r"\frac{a}{b}", "a / b", False),
        (r"\frac{a}{b}", r"\frac{b}{a}", False),
        (r"\sum_{i=1}^{k} i", r"\sum_{i=1}^{n} i", False),
        # Nothing is in line with an exponent, so the official scorer too passes this.
        (r"x^{2}", r"x_{2}", True),
    ],
)
def test_rendered_equations_look_the_same(
    katex: Katex, wanted: str, found: str, is_there: bool
) -> None:
    (first, second) = (katex.render(wanted), katex.render(found))
    assert first is not None and second is not None
    assert is_within(first, second) == is_there


def test_what_katex_does_not_understand_is_none(katex: Katex) -> None:
    assert katex.render(r"\frac{a}{") is None
    assert katex.render("x" * 30_000) is None


def test_an_answer_reaches_no_file_and_no_network(katex: Katex) -> None:
    """KaTeX refuses to include files, and the page may ask only for KaTeX's own."""
    rendered = katex.render(r"\includegraphics{file:///etc/hostname}")
    assert rendered is None or "img" not in rendered.mathml
    script = """url => fetch(url).then(() => "reached", () => "refused")"""
    for url in ("http://example.invalid/", "http://katex.invalid//etc/hostname"):
        assert katex._page.evaluate(script, url) == "refused"


def test_without_katex_the_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(NoMath, match=r"has no katex\.min\.js"):
        Katex(tmp_path)
