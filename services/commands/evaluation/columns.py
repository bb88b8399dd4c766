"""Rows of Parquet and Arrow files, whose images are read only when they are sent."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from services.commands.client import ClientError
from services.commands.evaluation.data import BadData, take

GROUPS_IN_MEMORY = 4
"""The row groups whose images are kept. Items are asked in order, so few are enough."""


@dataclass(frozen=True)
class ColumnRow:
    """A row of a Parquet file, without the columns that were left out."""

    path: Path
    group: int
    """The row group."""
    number: int
    """The number of the row in its group."""
    line: int
    """The number of the row in the file, from 1."""
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}, row {self.line}"

    def take(self, column: str, kind: type | tuple[type, ...]) -> Any:
        """Return a cell, or raise BadData if it is missing or of another type."""
        return take(self.values, column, kind, self.place)

    def image(self, column: str) -> bytes:
        """Return the bytes of an image in a column that was left out."""
        cell = column_of(self.path, self.group, column)[self.number].as_py()
        return bytes(take(cell, "bytes", bytes, f"{self.place}, column {column}"))


def read_parquet(path: Path, left_out: Sequence[str]) -> Iterator[ColumnRow]:
    """Yield the rows of a Parquet file without the columns `left_out`, or raise BadData."""
    file = open_parquet(path)
    columns = [name for name in file.schema_arrow.names if name not in left_out]
    line = 0
    for group in range(file.num_row_groups):
        for number, values in enumerate(file.read_row_group(group, columns).to_pylist()):
            line += 1
            yield ColumnRow(path, group, number, line, values)


def open_parquet(path: Path) -> Any:
    parquet = import_pyarrow("parquet")
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise BadData(f"{path}: expected a Parquet file ({error})") from error


@lru_cache(GROUPS_IN_MEMORY)
def column_of(path: Path, group: int, column: str) -> Any:
    """Return a column of a row group."""
    return open_parquet(path).read_row_group(group, [column]).column(0)


def import_pyarrow(module: str) -> ModuleType:
    """Return a module of pyarrow.

    Raises
    ------
    ClientError
        If it is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise ClientError(
            "this file needs the extra `tools`: pip install 'twinlens[tools]'"
        ) from error
