"""olmOCR-bench: whether the Markdown of a PDF's page has what tests say of the page.

Poznanski et al., "olmOCR: unlocking trillions of tokens in PDFs with vision language models". The
tests and the scores are in the package `olmocr`. It needs the extra `tools`, and is imported late.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from glob import escape
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from services.commands.client import NEEDS_TOOLS, ClientError, whole_number
from services.commands.evaluation.prompts import by_family
from services.commands.evaluation.records import write
from services.commands.evaluation.task import Answered, Item, Scores, Task
from services.commands.sample import SAMPLE_PROMPT

if TYPE_CHECKING:
    from services.commands.evaluation.olmocr.bench import Page

LONGEST_SIDE = 1288
"""The size in pixels of the pages that olmOCR's models were trained on."""
ANSWERS = "answers"


def load(arguments: argparse.Namespace) -> list[Item]:
    """Return an item for each page and repetition. Its id is the name of its Markdown file."""
    from services.commands.evaluation.olmocr.pages import page_image

    bench = import_bench().read_bench(arguments.data)
    items = []
    for page in bench.pages:
        (pdf, number) = page
        image = partial(page_image, bench.pdfs / pdf, number, arguments.longest_side)
        for repeat, name in enumerate(answer_names(page, arguments)):
            items.append(Item(name, (image, arguments.prompt), page, repeat))
    return items


def answer_names(page: "Page", arguments: argparse.Namespace) -> list[str]:
    """Return the names of a page's answers. A folder of answers shows itself how many there are."""
    (pdf, number) = page
    stem = f"{pdf.removesuffix('.pdf')}_pg{number}_repeat"
    given = arguments.answers
    if given is not None and given.is_dir():
        found = sorted(given.glob(f"{escape(stem)}*.md"))
        if found:
            return [file.relative_to(given).as_posix() for file in found]
    return [f"{stem}{repeat + 1}.md" for repeat in range(arguments.repeats)]


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    """Score the answers. A page without an answer fails all its tests."""
    scoring = import_scoring()
    texts = {one.item.id: None if one.failed else one.output for one in answered}
    items = load(arguments)[: arguments.limit]
    answers = [scoring.PageAnswer(item.target, texts.get(item.id)) for item in items]
    bench = import_bench().read_bench(arguments.data)
    scores = scoring.judge(bench, answers, arguments.katex)
    if arguments.answers is None:
        write_answers(arguments.out / ANSWERS, answered)
    parts = {item.id: part for item, part in zip(items, scores.parts, strict=True)}
    missing = sum(item.id not in texts for item in items)
    notes = [f"{missing} pages have no answer, and fail their tests"] if missing else []
    return replace(
        scores, parts=[parts[one.item.id] for one in answered], notes=[*scores.notes, *notes]
    )


def write_answers(folder: Path, answered: Sequence[Answered]) -> None:
    """Write the answers as the benchmark's own scorer reads them, those of failed requests empty.

    Raises
    ------
    ClientError
        If the folder cannot be written.
    """
    try:
        for one in answered:
            file = folder / one.item.id
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, one.output)
    except OSError as error:
        raise ClientError(f"cannot write {folder}: {error.strerror}") from error


def import_bench() -> ModuleType:
    return import_own("bench")


def import_scoring() -> ModuleType:
    return import_own("scoring")


def import_own(name: str) -> ModuleType:
    """Return a module of the package `olmocr`.

    Raises
    ------
    ClientError
        If the packages that it needs are not installed.
    """
    try:
        return import_module(f"services.commands.evaluation.olmocr.{name}")
    except ImportError as error:
        raise ClientError(f"olmocr-bench {NEEDS_TOOLS}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats",
        type=whole_number(1, 1000),
        default=1,
        metavar="N",
        help="how often each page is asked (default: %(default)s)",
    )
    parser.add_argument(
        "--longest-side",
        type=whole_number(28, 16_384),
        default=LONGEST_SIDE,
        metavar="PX",
        help="the longest side of a page's image (default: %(default)s)",
    )
    parser.add_argument(
        "--katex",
        type=Path,
        metavar="DIR",
        help="folder with katex.min.js, for the math tests (default: that of Debian's libjs-katex)",
    )


OLMOCR_BENCH = Task(
    name="olmocr-bench",
    help="olmOCR-bench: tests of the text, order, tables and equations of PDF pages",
    data="folder with .jsonl files and the folder pdfs, or one of its .jsonl files",
    prompt=by_family(SAMPLE_PROMPT),
    load=load,
    score=score,
    max_tokens=None,
    add_arguments=add_arguments,
    asked_by=["longest_side"],
)
