"""One part of `scripts/gpu` as a process.

    python -m benchmarks.gpu.part [--dry-run] NAME ROWS SECONDS

It appends its rows to the file ROWS, and is interrupted after SECONDS.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import end_with_parent
from benchmarks.gpu.runner import EXIT_SKIPPED, append_line, read_lines
from benchmarks.gpu.sizes import CARD, DRY, Sizes


class Skip(Exception):
    """A part cannot run here; the message says why."""


@dataclass
class Task:
    """What a part has to do, and where its rows go."""

    part: str
    rows: Path
    seconds: float
    """The time until it is interrupted, from the start on."""
    dry_run: bool
    folder: Path
    """For checkpoints, which are made once and kept."""
    began: float = field(default_factory=time.monotonic)
    num_failed: int = 0

    @property
    def sizes(self) -> Sizes:
        return DRY if self.dry_run else CARD

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def row(self, table: str, **figures: Any) -> None:
        """Write a row of a table. One that has `ok=False` makes the part fail at its end."""
        append_line(self.rows, {"part": self.part, "table": table} | figures)
        self.num_failed += figures.get("ok") is False

    @contextmanager
    def attempt(self, table: str, **names: Any) -> Iterator[None]:
        """Write what a case raises as a row that is not ok, and let the part go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (each case stands alone)
            traceback.print_exc()
            self.row(table, **names, error=f"{type(error).__name__}: {error}"[:200], ok=False)

    def rows_of(self, part: str) -> list[dict[str, Any]]:
        """Return what an earlier part measured."""
        return [row for row in read_lines(self.rows) if row["part"] == part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(".gpu/checkpoints"))
    parser.add_argument("name")
    parser.add_argument("rows", type=Path)
    parser.add_argument("seconds", type=float)
    options = parser.parse_args()
    end_with_parent()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
    task = Task(options.name, options.rows, options.seconds, options.dry_run, options.folder)
    # Only now: a part imports what others need not have.
    module = importlib.import_module(f"benchmarks.gpu.parts.{options.name}")
    try:
        module.run(task)
    except Skip as reason:
        print(reason)
        return EXIT_SKIPPED
    if task.num_failed:
        print(f"{task.num_failed} rows are not ok")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
