"""The data of olmOCR-bench: the tests of its .jsonl files, and the pages that they are about."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from services.commands.evaluation.data import BadData, read_json_lines
from services.commands.evaluation.olmocr.checks import ANY_CHECK, Baseline, Check

PDFS = "pdfs"
BASELINE = "baseline"
"""Where the tests that every PDF has are counted."""

Page = tuple[str, int]
"""A PDF's path in the folder of PDFs, and the page, counted from 1."""


@dataclass(frozen=True)
class Bench:
    """The tests, each with the name of its file, and the folder of the PDFs."""

    pdfs: Path
    checks: Sequence[tuple[str, Check]]

    @property
    def pages(self) -> list[Page]:
        """The pages that tests are about, in order."""
        return sorted({(check.pdf, check.page) for _, check in self.checks})


def read_bench(path: Path) -> Bench:
    """Read one .jsonl file, or all in a folder; the PDFs are in the folder `pdfs` next to them.

    Each PDF gets a baseline test of its first page, unless it has one. For one file, only the PDFs
    that it names do.

    Raises
    ------
    BadData
        If a file is not as the benchmark publishes it.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise BadData(f"{path}: expected .jsonl files")
    checks = [(file.name, check) for file in files for check in read_checks(file)]
    pdfs = files[0].parent / PDFS
    if path.is_dir():
        names = {file.relative_to(pdfs).as_posix() for file in pdfs.rglob("*.pdf")}
    else:
        names = {check.pdf for _, check in checks}
    with_baseline = {check.pdf for _, check in checks if check.type == BASELINE}
    return Bench(pdfs, checks + [baseline_of(name) for name in sorted(names - with_baseline)])


def baseline_of(pdf: str) -> tuple[str, Check]:
    return BASELINE, Baseline(id=f"{pdf}_baseline", pdf=pdf, page=1, type="baseline")


def read_checks(file: Path) -> Iterator[Check]:
    """Yield the tests of a file."""
    seen: set[str] = set()
    for place, row in read_json_lines(file):
        try:
            check = ANY_CHECK.validate_python(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise BadData(f"{place}: {field}: {first['msg']}") from error
        if check.id in seen:
            raise BadData(f"{place}: expected ids that differ, but {check.id} occurs twice")
        seen.add(check.id)
        yield check
