"""The kinds of image: how large, how much text, how it looks; and those that the model is measured
on."""

import random
from dataclasses import dataclass

from layouts import Layout, lay_document, lay_lines, lay_receipt
from settings import MAX_CELLS, MIN_CELLS

LINE_LAYOUTS = (lay_lines,)


@dataclass(frozen=True)
class Kind:
    rows: tuple[int, int]  # of the grid of cells
    columns: tuple[int, int]
    layout: Layout
    fewest: int  # lines
    most: int
    filled: bool = False
    px: tuple[int, int, int] = (15, 33, 21)  # smallest, largest, most usual
    expected: int = 100  # characters


@dataclass(frozen=True)
class Look:
    """Shares of the images that are drawn otherwise than dark on light in the kind's own size."""

    light_on_dark: float = 0.0
    tinted: float = 0.0  # dark on a paper of middle brightness
    small: float = 0.0  # 12-15 px
    blank: float = 0.0


KINDS = {
    "short": Kind((1, 2), (4, 9), lay_lines, 1, 1, expected=10),
    "line": Kind((1, 2), (8, 16), lay_lines, 1, 1, True, expected=26),
    "lines": Kind((2, 5), (6, 15), lay_lines, 2, 4, expected=35),
    "3 lines": Kind((3, 5), (7, 16), lay_lines, 3, 3, True),
    "small receipt": Kind((3, 6), (6, 10), lay_receipt, 3, 5, expected=60),
    "receipt": Kind((6, 11), (7, 13), lay_receipt, 6, 10),
    "long receipt": Kind((10, 20), (8, 13), lay_receipt, 10, 22, px=(14, 28, 18), expected=300),
    "page": Kind((4, 10), (8, 16), lay_lines, 4, 8, True),
    "title": Kind((2, 6), (7, 16), lay_lines, 1, 3, px=(34, 60, 44), expected=20),
    "small": Kind((2, 6), (8, 16), lay_lines, 2, 6, True, px=(14, 14, 14), expected=150),
    "document": Kind((5, 13), (9, 16), lay_document, 4, 12, px=(13, 28, 18), expected=250),
    "full page": Kind((12, 16), (12, 16), lay_document, 12, 26, px=(13, 24, 16), expected=550),
}
TRAINING = Look(light_on_dark=0.22, tinted=0.1, small=0.18, blank=0.005)
DARK_ON_LIGHT = Look()
HELD_OUT = {
    "short": ("short", DARK_ON_LIGHT),
    "line": ("line", DARK_ON_LIGHT),
    "3 lines": ("3 lines", DARK_ON_LIGHT),
    "receipt": ("receipt", DARK_ON_LIGHT),
    "page": ("page", DARK_ON_LIGHT),
    "light on dark": ("lines", Look(light_on_dark=1.0)),
    "title": ("title", DARK_ON_LIGHT),
    "small": ("small", DARK_ON_LIGHT),
    "long receipt": ("long receipt", DARK_ON_LIGHT),
    "full page": ("full page", DARK_ON_LIGHT),
}


def pick_grid(rng: random.Random, kind_name: str) -> tuple[int, int]:
    kind = KINDS[kind_name]
    while True:
        rows = rng.randint(*kind.rows)
        columns = rng.randint(*kind.columns)
        if kind_name == "line" and rows == 2 and rng.random() < 0.4:
            rows = 1
        if MIN_CELLS <= rows * columns <= MAX_CELLS:
            return rows, columns
