"""Tables in an answer, in Markdown or HTML, and which cells are next to each other.

A cell is named by the row and column of its upper left place. Several cells can be on one side of
a cell, because cells span rows and columns. What counts as a table, a heading and a neighbour is
as in olmOCR's bench (Apache-2.0, github.com/allenai/olmocr, commit f7cfe4c,
olmocr/bench/table_parsing.py).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from bs4 import BeautifulSoup, Tag

MAX_PLACES = 1_000_000
"""A table with more places is ignored: spans of an answer must not decide how much memory is used.
"""

Place = tuple[int, int]
"""Row and column."""
UP = (-1, 0)
DOWN = (1, 0)
LEFT = (0, -1)
RIGHT = (0, 1)


@dataclass(frozen=True)
class Cell:
    """What a table's source says about a cell."""

    text: str
    is_heading: bool
    rows: int = 1
    columns: int = 1


@dataclass
class Table:
    """A table's cells by name, and which cell covers each place.

    A place that no cell covers is missing from `covered_by`.
    """

    cells: dict[Place, Cell] = field(default_factory=dict)
    covered_by: dict[Place, Place] = field(default_factory=dict)
    num_rows: int = 0
    num_columns: int = 0

    def neighbours(self, name: Place, direction: Place) -> set[Place]:
        """Return the nearest cell in this direction of each row or column that the cell spans."""
        found = (self._nearest(name, place, direction) for place in self._outside(name, direction))
        return {neighbour for neighbour in found if neighbour is not None}

    def headings(self, name: Place, direction: Place) -> set[Place]:
        """Return the heading cells in this direction, or the last cells if none is a heading."""
        reached = {name}
        waiting = [name]
        ends: set[Place] = set()
        while waiting:
            current = waiting.pop()
            following = self.neighbours(current, direction)
            if not following:
                ends.add(current)
            waiting += following - reached
            reached |= following
        headings = {cell for cell in reached if self.cells[cell].is_heading}
        return (headings - {name}) or (ends - {name})

    def _outside(self, name: Place, direction: Place) -> Iterator[Place]:
        """Yield the places that touch the cell on this side."""
        cell = self.cells[name]
        (row, column) = name
        if direction in (UP, DOWN):
            y = row - 1 if direction == UP else row + cell.rows
            yield from ((y, x) for x in range(column, column + cell.columns))
        else:
            x = column - 1 if direction == LEFT else column + cell.columns
            yield from ((y, x) for y in range(row, row + cell.rows))

    def _nearest(self, name: Place, place: Place, direction: Place) -> Place | None:
        (row, column) = place
        while 0 <= row < self.num_rows and 0 <= column < self.num_columns:
            found = self.covered_by.get((row, column))
            if found not in (None, name):
                return found
            row += direction[0]
            column += direction[1]
        return None


def find_tables(markdown: str, in_markdown: bool = True) -> list[Table]:
    """Return the tables of an answer: those in Markdown, unless told otherwise, then in HTML."""
    sources = [*(_markdown_tables(markdown) if in_markdown else ()), *_html_tables(markdown)]
    return [table for rows in sources if (table := _laid_out(rows)) is not None]


def _markdown_tables(text: str) -> Iterator[list[list[Cell]]]:
    for has_pipe, lines in groupby(text.strip().split("\n"), lambda line: "|" in line):
        rows = list(lines)
        if has_pipe and len(rows) >= 2:
            yield [_markdown_cells(i, cells) for i, cells in enumerate(_markdown_rows(rows))]


def _markdown_rows(lines: list[str]) -> Iterator[list[str]]:
    for line in lines:
        # A rule between rows, as below the headings.
        if set(line.strip()) <= set("- :|"):
            continue
        cells = [cell.strip() for cell in line.split("|")]
        # The pipes at the ends of the line are its frame.
        cells = cells[1:] if not cells[0] else cells
        cells = cells[:-1] if cells and not cells[-1] else cells
        if cells:
            yield cells


def _markdown_cells(row: int, texts: Iterable[str]) -> list[Cell]:
    return [Cell(text, row == 0 or column == 0) for column, text in enumerate(texts)]


def _html_tables(text: str) -> Iterator[list[list[Cell]]]:
    if "<table" not in text.lower():
        return
    for table in BeautifulSoup(text, "html.parser").find_all("table"):
        rows = table.find_all("tr")
        yield [_html_cells(row, len(rows) - i) for i, row in enumerate(rows)]


def _html_cells(row: Tag, rows_left: int) -> list[Cell]:
    is_head = row.find_parent("thead") is not None
    return [
        Cell(
            _text_of(cell),
            is_head or cell.name == "th",
            # In HTML, a cell of 0 rows reaches to the table's end.
            rows_left if str(cell.get("rowspan")).strip() == "0" else _span(cell, "rowspan"),
            _span(cell, "colspan"),
        )
        for cell in row.find_all(["th", "td"], recursive=False)
    ]


def _text_of(cell: Tag) -> str:
    for line_break in cell.find_all("br"):
        line_break.replace_with("\n")
    return cell.get_text().strip()


def _span(cell: Tag, attribute: str) -> int:
    found = re.fullmatch(r"\s*\+?(\d{1,9})\s*", str(cell.get(attribute, "1")))
    return max(1, int(found[1])) if found else 1


def _laid_out(rows: Sequence[Sequence[Cell]]) -> Table | None:
    """Return the table with each cell at its place; None if it has no cell, or is too large."""
    table = Table(num_rows=len(rows))
    # For each column, the cell that reaches furthest down, and the row where it ends.
    reaching: dict[int, tuple[Place, int]] = {}
    row = 0
    while row < table.num_rows:
        column = 0
        for cell in rows[row] if row < len(rows) else ():
            while column in reaching and reaching[column][1] > row:
                column += 1
            table.cells[row, column] = cell
            table.num_rows = max(table.num_rows, row + cell.rows)
            table.num_columns = max(table.num_columns, column + cell.columns)
            if table.num_rows * table.num_columns > MAX_PLACES:
                return None
            end = row + cell.rows
            reaching |= dict.fromkeys(range(column, column + cell.columns), ((row, column), end))
            column += cell.columns
        table.covered_by |= {(row, x): name for x, (name, end) in reaching.items() if end > row}
        row += 1
    return table if table.cells else None
