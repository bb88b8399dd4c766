"""OCRBench: whether a correct answer occurs in the model's.

Liu et al., "OCRBench: on the hidden mystery of OCR in large multimodal models". The rules are those
of VLMEvalKit (vlmeval/dataset/image_vqa.py, class OCRBench), with which results are published.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from services.commands.evaluation.columns import read_parquet
from services.commands.evaluation.data import (
    BadData,
    image_file,
    read_json,
    take,
)
from services.commands.evaluation.prompts import QUESTION, by_family
from services.commands.evaluation.task import (
    Answered,
    Item,
    ReadImage,
    Row,
    Scores,
    Task,
    fill,
    mean,
)
from services.commands.evaluation.tsv import as_list, read_tsv

TEXT = "Text Recognition"
FORMULAS = "Handwritten Mathematical Expression Recognition"
GROUPS = {
    "Regular Text Recognition": TEXT,
    "Irregular Text Recognition": TEXT,
    "Artistic Text Recognition": TEXT,
    "Handwriting Recognition": TEXT,
    "Digit String Recognition": TEXT,
    "Non-Semantic Text Recognition": TEXT,
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    FORMULAS: FORMULAS,
}
"""The group of each category."""
ALL_ITEMS = 1000
IMAGES = "OCRBench_Images"
Target = tuple[str, Sequence[str]]
"""An item's category and its correct answers."""


def load(arguments: argparse.Namespace) -> list[Item]:
    path: Path = arguments.data
    readers = {".tsv": from_tsv, ".parquet": from_parquet, ".json": from_json}
    if path.suffix not in readers:
        raise BadData(f"{path}: expected a .tsv, .parquet or .json file")
    return [
        Item(id, (image, fill(arguments.prompt, question=question)), target)
        for id, image, question, target in readers[path.suffix](path, arguments)
    ]


Question = tuple[str, ReadImage, str, Target]
"""An item's id, image, question, and what its score needs."""


def from_tsv(path: Path, arguments: argparse.Namespace) -> Iterator[Question]:
    """Yield the questions of VLMEvalKit's file."""
    for row, images in read_tsv(path):
        target = as_target(row.take("category"), as_list(row.take("answer")), row.place)
        yield row.take("index"), images[0], row.take("question"), target


def from_parquet(path: Path, arguments: argparse.Namespace) -> Iterator[Question]:
    """Yield the questions of a file of echo840/OCRBench on Hugging Face."""
    for row in read_parquet(path, ["image"]):
        target = as_target(row.take("question_type", str), row.take("answer", list), row.place)
        yield str(row.line - 1), partial(row.image, "image"), row.take("question", str), target


def from_json(path: Path, arguments: argparse.Namespace) -> Iterator[Question]:
    """Yield the questions of the authors' file, whose images are in a folder."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise BadData(f"{path}: expected a list of questions")
    folder = arguments.images or path.parent / IMAGES
    for number, row in enumerate(rows):
        place = f"{path}, item {number}"
        answers = take(row, "answers", (list, str), place)
        answers = [answers] if isinstance(answers, str) else answers
        target = as_target(take(row, "type", str, place), answers, place)
        image = image_file(folder / take(row, "image_path", str, place), place)
        yield str(row.get("id", number)), image, take(row, "question", str, place), target


def as_target(category: str, answers: Sequence[str], place: str) -> Target:
    if category not in GROUPS:
        raise BadData(f"{place}: expected one of OCRBench's ten categories, not {category!r}")
    if not answers:
        raise BadData(f"{place}: expected at least one answer")
    return category, answers


def is_right(output: str, target: Target) -> bool:
    """Whether any of the correct answers occurs in the model's.

    Formulas are compared without spaces, and with their case. All else is compared in lower case.
    """
    category, answers = target
    normalise = without_spaces if category == FORMULAS else lower
    return any(normalise(answer) in normalise(output) for answer in answers)


def without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def lower(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    right = [not one.failed and is_right(one.output, one.item.target) for one in answered]
    categories = [one.item.target[0] for one in answered]
    rows = []
    for category in GROUPS:
        hits = [hit for hit, own in zip(right, categories, strict=True) if own == category]
        if hits:
            rows.append(Row(category, len(hits), sum(hits), "acc", mean(hits)))
    rows.append(Row("ocrbench", len(right), sum(right), "acc", mean(right)))
    parts = [
        {"category": category, "right": int(hit)}
        for category, hit in zip(categories, right, strict=True)
    ]
    return Scores(rows, parts, report(categories, right), notes_on(len(right)))


def report(categories: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """Return the scores of the five groups and the final ones, as VLMEvalKit prints them."""
    groups = dict.fromkeys(GROUPS.values(), 0)
    for category, hit in zip(categories, right, strict=True):
        groups[GROUPS[category]] += hit
    final = sum(groups.values())
    return groups | {"Final Score": final, "Final Score Norm": final / 10}


def notes_on(count: int) -> Sequence[str]:
    if count == ALL_ITEMS:
        return ()
    return [
        f"Final Score counts right answers of {count}, not of the benchmark's {ALL_ITEMS} items"
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help=f"the image folder of a .json file (default: {IMAGES} next to it)",
    )


OCRBENCH = Task(
    name="ocrbench",
    help="OCRBench: reading text in images; five groups, Final Score and Final Score Norm",
    data="OCRBench.tsv of VLMEvalKit, .parquet of echo840/OCRBench, or the authors' OCRBench.json",
    prompt=by_family(QUESTION),
    load=load,
    score=score,
    max_tokens=512,
    add_arguments=add_arguments,
    asked_by=["images"],
)
