"""Equations in an answer, and whether two rendered ones look the same.

An equation is in the answer if the structure that KaTeX finds in it (as MathML) is a part of an
answer's equation. Otherwise each symbol of the wanted equation must be found in the answer's, and
have the same symbols next to it. The rules and the constants are those of olmOCR's bench
(Apache-2.0, github.com/allenai/olmocr, commit f7cfe4c, olmocr/bench/tests.py and
olmocr/bench/katex/render.py).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz

IN_LINE_PX = 5
"""Two symbols are in one row or column if their centres are at most this far out of line."""
MOST_SYMBOLS = 4_000
"""An equation of more symbols counts as different: its length must not decide the time it takes."""
MOST_STEPS = 100_000
"""After this many attempts to match their symbols, two equations count as different."""
DELIMITERS = (r"\\\((.+?)\\\)", r"\\\[(.+?)\\\]")
DOLLARS = (r"\$\$(.+?)\$\$", r"\$(.+?)\$")
SPACES = re.compile("[\\s\u200a-\u200d\u2060\ufeff]+")

Neighbours = tuple[int | None, int | None, int | None, int | None]
"""The nearest symbol above, below, to the left and to the right."""


@dataclass(frozen=True)
class Symbol:
    """A piece of a rendered equation: its text, and its box in pixels."""

    text: str
    x: float
    y: float
    width: float
    height: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    def characters(self) -> Iterator["Symbol"]:
        """Yield each character that is not a space, as if all had the same width."""
        text = SPACES.sub("", self.text)
        for i, character in enumerate(text):
            width = self.width / len(text)
            yield Symbol(character, self.x + i * width, self.y, width, self.height)


@dataclass(frozen=True)
class Rendered:
    """An equation as a browser shows it."""

    mathml: str
    symbols: Sequence[Symbol]


def find_equations(markdown: str, with_dollars: bool) -> list[str]:
    r"""Return the LaTeX of the equations in \(...\) and \[...\], then in $$...$$ and $...$."""
    found: list[str] = []
    for pattern in (*DELIMITERS, *(DOLLARS if with_dollars else ())):
        found += [equation.strip() for equation in re.findall(pattern, markdown, re.DOTALL)]
        markdown = re.sub(pattern, "", markdown, flags=re.DOTALL)
    return found


def by_likeness(equations: Iterable[str], wanted: str) -> list[str]:
    """Return each equation once, those first whose LaTeX is most like the wanted one."""
    return sorted(set(equations), key=lambda equation: -fuzz.ratio(equation, wanted))


def is_within(wanted: Rendered, found: Rendered) -> bool:
    """Whether the wanted equation is a part of the other one, or looks like a part of it."""
    if _structure(wanted.mathml) in _structure(found.mathml):
        return True
    symbols = [c for symbol in found.symbols for c in symbol.characters()]
    if len(symbols) > MOST_SYMBOLS:
        return False
    return _looks_like([c for symbol in wanted.symbols for c in symbol.characters()], symbols)


def _structure(mathml: str) -> str:
    """Return the MathML inside of <semantics> but for the LaTeX source, without spaces."""
    inner = re.sub(r"(?s)^.*?<semantics[^>]*>|</semantics>.*$", "", mathml)
    return SPACES.sub("", re.sub(r"(?s)<annotation\b.*?</annotation>", "", inner))


def _looks_like(wanted: Sequence[Symbol], found: Sequence[Symbol]) -> bool:
    """Whether each wanted symbol has a counterpart of its own, with the same symbols around it."""
    places = defaultdict(list)
    for i, symbol in enumerate(found):
        places[symbol.text].append(i)
    if not all(symbol.text in places for symbol in wanted):
        return False
    near = _neighbours(wanted)
    near_found = _neighbours(found)
    chosen: list[int] = []

    def fits(candidate: int) -> bool:
        for mine, other in zip(near[len(chosen)], near_found[candidate], strict=True):
            if mine is None:
                continue
            if other is None or found[other].text != wanted[mine].text:
                return False
            if mine < len(chosen) and chosen[mine] != other:
                return False
        return candidate not in chosen

    # A search with a stack of its own, since an equation may have more symbols than Python calls.
    untried = [iter(places[symbol.text]) for symbol in wanted[:1]]
    for _ in range(MOST_STEPS):
        if len(chosen) == len(wanted):
            return True
        candidate = next(filter(fits, untried[-1]), None)
        if candidate is not None:
            chosen.append(candidate)
            untried += [iter(places[symbol.text]) for symbol in wanted[len(chosen) :][:1]]
        elif chosen:
            del untried[len(chosen) :]
            chosen.pop()
        else:
            break
    return False


def _neighbours(symbols: Sequence[Symbol]) -> list[Neighbours]:
    """Return the nearest symbols around each one."""
    centres = np.array([symbol.centre for symbol in symbols]).reshape(-1, 2)
    return [_around(centres - centre) for centre in centres]


def _around(offsets: np.ndarray) -> Neighbours:
    (x, y) = offsets.T
    in_column = abs(x) <= IN_LINE_PX
    in_row = abs(y) <= IN_LINE_PX
    return (
        _nearest(-y, in_column),
        _nearest(y, in_column),
        _nearest(-x, in_row),
        _nearest(x, in_row),
    )


def _nearest(distances: np.ndarray, is_in_line: np.ndarray) -> int | None:
    """Return the index of the least distance over 0 of those in line; None if there is none."""
    ahead = np.where(is_in_line & (distances > 0), distances, np.inf)
    nearest = int(ahead.argmin())
    return None if np.isinf(ahead[nearest]) else nearest
