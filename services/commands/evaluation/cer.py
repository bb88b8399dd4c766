"""The character error rate and the word error rate of a text read from an image."""

import argparse
import string
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from services.commands.client import NEEDS_TOOLS, ClientError
from services.commands.evaluation.data import (
    BadData,
    image_file,
    read_json,
    read_json_lines,
    read_text,
    take,
)
from services.commands.evaluation.prompts import by_family
from services.commands.evaluation.task import (
    Answered,
    Item,
    ReadImage,
    Row,
    Scores,
    Task,
    mean,
)
from services.commands.sample import SAMPLE_PROMPT

IMAGES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".gif"])


def load(arguments: argparse.Namespace) -> list[Item]:
    path: Path = arguments.data
    pages = folder_pages(path) if path.is_dir() else file_pages(path)
    return [Item(id, (image, arguments.prompt), text) for id, image, text in pages]


def folder_pages(folder: Path) -> Iterator[tuple[str, ReadImage, str]]:
    """Yield the name, image and text of each page: an image with a .txt file next to it."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES:
            yield path.name, path.read_bytes, read_text(path.with_suffix(".txt"))


def file_pages(path: Path) -> Iterator[tuple[str, ReadImage, str]]:
    """Yield the name, the image and the text of each object in a .jsonl or .json file."""
    for place, row in rows_of(path):
        name = take(row, "image" if "image" in row else "file", str, place)
        yield name, image_file(path.parent / name, place), take(row, "text", str, place)


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from read_json_lines(path)
        return
    rows = read_json(path)
    if not isinstance(rows, list):
        raise BadData(f"{path}: expected a list of objects with image and text")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadData(f"{path}, item {number}: expected an object with image and text")
        yield f"{path}, item {number}", row


def normalise(text: str, arguments: argparse.Namespace) -> str:
    """Return a text as it is compared: composed, and changed further as the flags say."""
    text = unicodedata.normalize("NFC", text)
    if arguments.ignore_case:
        text = text.casefold()
    if arguments.ignore_punctuation:
        text = text.translate(str.maketrans("", "", string.punctuation))
    return text if arguments.exact_whitespace else " ".join(text.split())


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    """Sum the edits over all items and divide by the characters, and words, of their texts.

    An item whose request failed counts as an empty answer.
    """
    parts = [
        edits(normalise(one.output, arguments), normalise(one.item.target, arguments))
        for one in answered
    ]
    count = len(parts)
    exact = [part["character_edits"] == 0 for part in parts]
    rows = [
        Row("cer", count, sum(exact), "CER", rate(parts, "character")),
        Row("cer", count, sum(exact), "WER", rate(parts, "word")),
        Row("cer", count, sum(exact), "exact", mean(exact)),
    ]
    return Scores(rows, parts, notes=[rule(arguments)])


def edits(output: str, text: str) -> dict[str, int]:
    """Return the Levenshtein distances in characters and words, and the lengths of the text."""
    levenshtein = import_levenshtein()
    return {
        "character_edits": levenshtein(output, text),
        "characters": len(text),
        "word_edits": levenshtein(output.split(), text.split()),
        "words": len(text.split()),
    }


def rate(parts: Sequence[dict[str, int]], unit: str) -> float:
    """Return all edits per character, or word, of the texts. It may exceed 1."""
    length = sum(part[f"{unit}s"] for part in parts)
    wrong = sum(part[f"{unit}_edits"] for part in parts)
    return wrong / length if length else float(wrong > 0)


def rule(arguments: argparse.Namespace) -> str:
    """Return the sentence that says how texts were compared."""
    changes = ["Unicode NFC"]
    changes += ["case ignored"] if arguments.ignore_case else []
    changes += ["ASCII punctuation removed"] if arguments.ignore_punctuation else []
    changes += [
        "white space as it is"
        if arguments.exact_whitespace
        else "white space, line breaks too, as one space"
    ]
    return f"compared after: {', '.join(changes)}"


def import_levenshtein() -> Callable[[Sequence[Hashable], Sequence[Hashable]], int]:
    """Return rapidfuzz's distance of two sequences.

    Raises
    ------
    ClientError
        If it is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ClientError(f"cer {NEEDS_TOOLS}") from error
    return Levenshtein.distance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ignore-case", action="store_true", help="compare without case")
    parser.add_argument(
        "--ignore-punctuation", action="store_true", help="compare without ASCII punctuation"
    )
    parser.add_argument(
        "--exact-whitespace",
        action="store_true",
        help="compare spaces and line breaks as they are, instead of any as one space",
    )


CER = Task(
    name="cer",
    help="character and word error rate of the text read in images of your own",
    data="folder of images with a .txt next to each, or a .jsonl or .json of {image, text}",
    prompt=by_family(SAMPLE_PROMPT),
    load=load,
    score=score,
    max_tokens=None,
    add_arguments=add_arguments,
)
