"""MMMU: questions of college subjects, with images anywhere in the text.

Yue et al., "MMMU: a massive multi-discipline multimodal understanding and reasoning benchmark". Two
scores are in use and both are printed: VLMEvalKit's exact matching, and that of MMMU's own script
(`mmmu_official`).
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from services.commands.evaluation.choices import (
    CHOICE,
    Options,
    ask_for_option,
    chosen_option,
    options_of,
)
from services.commands.evaluation.columns import ColumnRow, read_parquet
from services.commands.evaluation.data import BadData
from services.commands.evaluation.mmmu_official import is_open_answer_right, official_option
from services.commands.evaluation.prompts import by_family
from services.commands.evaluation.task import (
    Answered,
    Item,
    Part,
    ReadImage,
    Row,
    Scores,
    Task,
    mean,
)
from services.commands.evaluation.tsv import as_list, read_tsv

MOST_IMAGES = 7
IMAGES = [f"image_{number}" for number in range(1, MOST_IMAGES + 1)]
IMAGE_MARK = re.compile(r"<image (\d)>")
SPLIT = "validation"
OTHER = "Other Answers"
"""VLMEvalKit makes an open question one with two options: the right answer, and this."""


@dataclass(frozen=True)
class Truth:
    """What is right for a question."""

    options: Options
    """Empty if the question is open."""
    answer: str
    """The letter of an option, or the text: one, or several as a list in Python's notation."""
    subject: str
    split: str


Question = tuple[str, str, str, Sequence[ReadImage], Truth, str]
"""An item's id, question, hint, images, what is right, and its place in the file."""


def load(arguments: argparse.Namespace) -> list[Item]:
    path: Path = arguments.data
    if path.suffix == ".tsv":
        questions = from_tsv(path)
    else:
        files = sorted(path.rglob(f"{arguments.split}-*.parquet")) if path.is_dir() else [path]
        questions = (question for file in files for question in from_parquet(file))
    items = []
    for id, question, hint, images, truth, place in questions:
        text = ask_for_option(arguments.prompt, question, truth.options, hint)
        items.append(Item(id, interleave(text, images, place), truth))
    return items


def from_tsv(path: Path) -> Iterator[Question]:
    """Yield the questions of VLMEvalKit's file."""
    for row, images in read_tsv(path):
        truth = Truth(
            options_of(row.values),
            row.take("answer"),
            row.values.get("category", ""),
            row.values.get("split", ""),
        )
        hint = row.values.get("hint", "")
        yield row.take("index"), row.take("question"), hint, images, truth, row.place


def from_parquet(path: Path) -> Iterator[Question]:
    """Yield the questions of a file of MMMU/MMMU on Hugging Face: one subject and split."""
    for row in read_parquet(path, IMAGES):
        id = row.take("id", str)
        split, _, rest = id.partition("_")
        texts = options_in(row)
        options = {chr(ord("A") + number): text for number, text in enumerate(texts)}
        truth = Truth(options, row.take("answer", str), rest.rpartition("_")[0], split)
        question = row.take("question", str)
        # Which images there are would be known only from reading them. The text names them.
        is_named = any(IMAGE_MARK.search(text) for text in (question, *texts))
        images = [partial(row.image, name) for name in (IMAGES if is_named else IMAGES[:1])]
        yield id, question, "", images, truth, row.place


def options_in(row: ColumnRow) -> list[str]:
    """Return the texts of the options, which are a list or a text in Python's notation."""
    options = row.take("options", (str, list))
    is_open = row.values.get("question_type") == "open"
    if is_open or options == "[]":
        return []
    return as_list(options) if isinstance(options, str) else options


def interleave(text: str, images: Sequence[ReadImage], place: str) -> list[Part]:
    """Return a text with its images where it names them; else the images before the text."""
    if not IMAGE_MARK.search(text):
        return [*images, text]
    parts: list[Part] = []
    for number, part in enumerate(IMAGE_MARK.split(text)):
        if number % 2 == 0:
            parts.append(part)
        elif 1 <= int(part) <= len(images):
            parts.append(images[int(part) - 1])
        else:
            raise BadData(f"{place}: expected image {part}, which the text names")
    return parts


def is_matched(output: str, truth: Truth) -> bool:
    """Whether VLMEvalKit's exact matching finds the right option in an answer."""
    options = truth.options or {"A": truth.answer, "B": OTHER}
    return chosen_option(output, options) == (truth.answer if truth.answer in options else "A")


def is_official(output: str, truth: Truth) -> bool:
    """Whether MMMU's own script finds the right answer in a model's."""
    if truth.options:
        return official_option(output, truth.options) == truth.answer
    return is_open_answer_right(output, as_list(truth.answer))


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    parts = [
        {
            "exact": int(not one.failed and is_matched(one.output, one.item.target)),
            "official": int(not one.failed and is_official(one.output, one.item.target)),
        }
        for one in answered
    ]
    truths: list[Truth] = [one.item.target for one in answered]
    groups = [["mmmu"] * len(truths)]
    if len({truth.split for truth in truths}) > 1:
        groups.append([f"mmmu {truth.split}" for truth in truths])
    groups.append([truth.subject for truth in truths])
    rows = []
    for names in groups:
        for name in sorted(set(names) - {""}):
            own = [part for part, of in zip(parts, names, strict=True) if of == name]
            for variant in ("exact", "official"):
                hits = [part[variant] for part in own]
                rows.append(Row(name, len(hits), sum(hits), f"acc ({variant})", mean(hits)))
    return Scores(rows, parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split",
        default=SPLIT,
        metavar="NAME",
        help="of a folder, the files that begin with this name (default: %(default)s)",
    )


MMMU = Task(
    name="mmmu",
    help="MMMU: college questions with images in the text; exact matching and the official score",
    data="MMMU_DEV_VAL.tsv of VLMEvalKit, or a .parquet or the folder of MMMU/MMMU",
    prompt=by_family(CHOICE),
    load=load,
    score=score,
    max_tokens=1024,
    add_arguments=add_arguments,
)
