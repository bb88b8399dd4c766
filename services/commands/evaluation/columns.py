"""Rows of Parquet and Arrow files, whose images are read only when they are sent."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from services.commands.client import NEEDS_TOOLS, ClientError
from services.commands.evaluation.data import BadData, take

GROUPS_IN_MEMORY = 4
"""The parts of a column that stay in memory. Items are asked in order, so few are enough."""


@dataclass(frozen=True)
class ColumnRow:
    """A row of a file, without the columns that were left out."""

    path: Path
    group: int
    """The part of the file that has the row: a row group, or a record batch."""
    number: int
    """The number of the row in its group."""
    line: int
    """The number of the row in the file, from 1."""
    values: dict[str, Any]
    read_column: Callable[[Path, int, str], Any]

    @property
    def place(self) -> str:
        return f"{self.path}, row {self.line}"

    def take(self, column: str, kind: type | tuple[type, ...]) -> Any:
        """Return a cell, or raise BadData if it is missing or of another type."""
        return take(self.values, column, kind, self.place)

    def image(self, column: str) -> bytes:
        """Return the bytes of an image in a column that was left out.

        A cell holds the bytes themselves or, in files of Hugging Face's datasets, an object with
        them.
        """
        cell = self.read_column(self.path, self.group, column)[self.number].as_py()
        if isinstance(cell, dict):
            cell = cell.get("bytes")
        if not isinstance(cell, bytes):
            raise BadData(f'{self.place}: expected the bytes of an image in "{column}"')
        return cell


def read_parquet(path: Path, left_out: Sequence[str]) -> Iterator[ColumnRow]:
    """Yield the rows of a Parquet file without the columns `left_out`, or raise BadData."""
    file = open_parquet(path)
    columns = columns_of(path, file.schema_arrow.names, left_out)
    groups = (file.read_row_group(group, columns) for group in range(file.num_row_groups))
    return rows_of(path, groups, parquet_column)


def read_arrow(path: Path, left_out: Sequence[str]) -> Iterator[ColumnRow]:
    """Yield the rows of an Arrow file without the columns `left_out`, or raise BadData."""
    file = open_arrow(path)
    columns = columns_of(path, file.schema.names, left_out)
    batches = (file.get_batch(batch) for batch in range(file.num_record_batches))
    return rows_of(path, (batch.select(columns) for batch in batches), arrow_column)


def columns_of(path: Path, names: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """Return the columns without those `left_out`, or raise BadData if one of these is missing."""
    for name in left_out:
        if name not in names:
            raise BadData(f'{path}: expected a column "{name}"')
    return [name for name in names if name not in left_out]


def rows_of(
    path: Path, groups: Iterator[Any], read_column: Callable[[Path, int, str], Any]
) -> Iterator[ColumnRow]:
    line = 0
    for group, rows in enumerate(groups):
        for number, values in enumerate(rows.to_pylist()):
            line += 1
            yield ColumnRow(path, group, number, line, values, read_column)


@lru_cache(GROUPS_IN_MEMORY)
def parquet_column(path: Path, group: int, column: str) -> Any:
    """Return a column of a row group."""
    return open_parquet(path).read_row_group(group, [column]).column(0)


@lru_cache(GROUPS_IN_MEMORY)
def arrow_column(path: Path, batch: int, column: str) -> Any:
    """Return a column of a record batch. Its pages are read from the file as they are used."""
    return open_arrow(path).get_batch(batch).column(column)


def open_parquet(path: Path) -> Any:
    parquet = import_pyarrow("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise BadData(f"{path}: expected a Parquet file ({error})") from error


def open_arrow(path: Path) -> Any:
    pyarrow = import_pyarrow("pyarrow")
    try:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    except (OSError, ValueError) as error:
        raise BadData(f"{path}: expected an Arrow file ({error})") from error


def import_pyarrow(module: str) -> ModuleType:
    """Return pyarrow, or a module of it.

    Raises
    ------
    ClientError
        If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ClientError(f"this file {NEEDS_TOOLS}") from error
