"""Files of tab-separated values with images in base64, as VLMEvalKit publishes them."""

import ast
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from services.commands.evaluation.data import BadData, decode_image
from services.commands.evaluation.task import ReadImage

MISSING = frozenset(
    [
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)
"""The cells that pandas, with which these files are made and read, takes for missing."""
LONGEST_CELL = 2**31 - 1
IMAGE = "image"
LONGEST_REFERENCE = 64
"""An image cell of at most this length is the index of the row that has the image."""


@dataclass(frozen=True)
class TsvRow:
    """A row of a file of tab-separated values, without its image."""

    path: Path
    header: list[str]
    line: int
    offset: int
    """Where the row begins in the file, in bytes."""
    length: int
    values: dict[str, str]
    """The cells that are not missing, by column."""

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.line}"

    def take(self, column: str) -> str:
        """Return a cell, or raise BadData if it is missing."""
        if column not in self.values:
            raise BadData(f'{self.place}: expected a value in column "{column}"')
        return self.values[column]

    def images(self) -> list[str]:
        """Read the row again and return its images in base64."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read(self.length).decode()
        cells = next(csv.reader([text], delimiter="\t"))
        return as_list(cells[self.header.index(IMAGE)])


def read_tsv(path: Path) -> Iterator[tuple[TsvRow, Sequence[ReadImage]]]:
    """Yield the rows that have images, and what reads these, or raise BadData.

    As in VLMEvalKit, an image cell is an image in base64, a list of them, or the index of the row
    that has the images. Rows without an image are left out.
    """
    holders: dict[str, tuple[TsvRow, int]] = {}
    rows: list[tuple[TsvRow, str]] = []
    for row, image in read_rows(path):
        index = row.take("index")
        if len(image) > LONGEST_REFERENCE:
            holders[index] = (row, len(as_list(image)))
        if image:
            rows.append((row, image if len(image) <= LONGEST_REFERENCE else index))
    for row, index in rows:
        if index not in holders:
            raise BadData(f"{row.place}: expected an image in base64, or the index of its row")
        holder, count = holders[index]
        yield row, [partial(read_image, holder, number) for number in range(count)]


def read_image(row: TsvRow, number: int) -> bytes:
    return decode_image(row.images()[number], row.place)


def as_list(cell: str) -> list[str]:
    """Return the texts of a cell that holds a list of them in Python's notation, or one text."""
    if not (len(cell) > 1 and cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        value = ast.literal_eval(cell)
    except (SyntaxError, ValueError):
        return [cell]
    return [str(each) for each in value]


def read_rows(path: Path) -> Iterator[tuple[TsvRow, str]]:
    """Yield the rows of a file whose first line names its columns.

    With each row comes its image cell, which the row itself does not hold; "" if it is missing.
    """
    csv.field_size_limit(LONGEST_CELL)
    try:
        file = path.open("rb")
    except OSError as error:
        raise BadData(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    with file:
        lines = Lines(file, path)
        reader = csv.reader(lines, delimiter="\t", strict=True)
        header = next(reader, [])
        while True:
            offset, line = lines.offset, lines.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise BadData(f"{path}, line {line}: expected quoted cells ({error})") from error
            if cells is None:
                return
            if not cells:
                continue  # an empty line, which pandas skips, too
            if len(cells) != len(header):
                raise BadData(
                    f"{path}, line {line}: expected {len(header)} cells as in the first line, "
                    f"not {len(cells)}"
                )
            values = {
                name: cell for name, cell in zip(header, cells, strict=True) if cell not in MISSING
            }
            image = values.pop(IMAGE, "")
            yield TsvRow(path, header, line, offset, lines.offset - offset, values), image


class Lines:
    """The lines of a file, as text, with the number of lines and bytes read so far."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.number = 0
        self.offset = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.number += 1
        self.offset += len(line)
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadData(f"{self._path}, line {self.number}: expected UTF-8") from error
