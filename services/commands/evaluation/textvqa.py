"""TextVQA: questions about text in photographs, with the answers of ten people.

Singh et al., "Towards VQA models that can read". Two scores are in use and both are printed:

- modeltest's, of the accuracy tests of MindIE-LLM
  (examples/atb_models/tests/modeltest/modeltest/task/textvqa.py);
- the official one of the VQA benchmark (`vqa_text`).
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from services.commands.evaluation.data import (
    BadData,
    image_file,
    read_json,
    read_json_lines,
    take,
)
from services.commands.evaluation.prompts import QUESTION, SHORT_ANSWER, by_family
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
from services.commands.evaluation.vqa_text import (
    Annotation,
    leave_one_out,
    official_score,
    one_line,
    plain_words,
    with_answers,
    without_punctuation,
)

END_MARKERS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<｜eot_id|>",
    "###",
    "</s>",
)
"""Where modeltest cuts an answer. The bars of the fifth are its own: one is full-width."""
NO_ANSWER = "-1"
"""What modeltest compares in place of an empty answer."""
LONGEST = 2048
"""modeltest ends with an error at a longer answer, in characters. Here it counts as wrong."""
IMAGES = "train_images"
Question = tuple[str, ReadImage, str, Sequence[Annotation]]
"""An item's id, image, question and the ten answers."""


def load(arguments: argparse.Namespace) -> list[Item]:
    path: Path = arguments.data
    readers = {".jsonl": from_lines, ".json": from_official}
    if path.suffix not in readers:
        raise BadData(f"{path}: expected a .jsonl or .json file")
    return [
        Item(id, (image, fill(arguments.prompt, question=question)), annotations)
        for id, image, question, annotations in readers[path.suffix](path, arguments.images)
    ]


def from_lines(path: Path, images: Path | None) -> Iterator[Question]:
    """Yield the questions of modeltest's file. The ten answers are in a file next to it."""
    annotations = read_annotations(annotations_file(path))
    for place, row in read_json_lines(path):
        id = take(row, "question_id", int, place)
        if id not in annotations:
            raise BadData(f"{annotations_file(path)}: expected answers to question {id} of {place}")
        image = Path(take(row, "image", str, place))
        file = path.parent / image if images is None else images / image.name
        yield str(id), image_file(file, place), take(row, "question", str, place), annotations[id]


def annotations_file(path: Path) -> Path:
    return path.with_name(f"{path.name.split('.')[0]}_annotations.json")


def read_annotations(path: Path) -> dict[int, list[Annotation]]:
    """Return the annotations of a file in the VQA benchmark's format, by question."""
    found = {}
    for number, row in enumerate(take(read_json(path), "annotations", list, str(path))):
        place = f"{path}, annotation {number}"
        found[take(row, "question_id", int, place)] = answers_of(row, place)
    return found


def answers_of(row: Any, place: str) -> list[Annotation]:
    """Return the answers of a question, each of which has the text `answer`."""
    answers = take(row, "answers", list, place)
    for answer in answers:
        take(answer, "answer", str, place)
    return answers


def from_official(path: Path, images: Path | None) -> Iterator[Question]:
    """Yield the questions of TextVQA_0.5.1_val.json, whose images are in a folder."""
    folder = images or path.parent / IMAGES
    for number, row in enumerate(take(read_json(path), "data", list, str(path))):
        place = f"{path}, item {number}"
        texts = take(row, "answers", list, place)
        annotations = [{"answer": str(text), "answer_id": i} for i, text in enumerate(texts, 1)]
        image = image_file(folder / f"{take(row, 'image_id', str, place)}.jpg", place)
        id = take(row, "question_id", int, place)
        yield str(id), image, take(row, "question", str, place), annotations


def modeltest_score(output: str, annotations: Sequence[Annotation]) -> float:
    """Return the score of an answer by modeltest, in [0, 1].

    The model's answer is always processed. The people's answers lose their punctuation only, and
    only if they differ.
    """
    text = output.lstrip() if output else NO_ANSWER
    for marker in END_MARKERS:
        text = text.split(marker)[0]
    text = one_line(text)
    if len(text) > LONGEST:
        return 0.0
    text = plain_words(without_punctuation(text))
    answers = [own["answer"] for own in annotations]
    if len(set(answers)) > 1:
        answers = [without_punctuation(answer) for answer in answers]
    return leave_one_out(text, with_answers(annotations, answers))


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    parts = [
        {
            "modeltest": 0.0 if one.failed else modeltest_score(one.output, one.item.target),
            "official": 0.0 if one.failed else official_score(one.output, one.item.target),
        }
        for one in answered
    ]
    rows = []
    for variant in ("modeltest", "official"):
        values = [part[variant] for part in parts]
        rows.append(Row("textvqa", len(values), sum(values), f"acc ({variant})", mean(values)))
    return Scores(rows, parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the image folder (default: as a .jsonl says; "
        f"{IMAGES} next to the official .json file)",
    )


TEXTVQA = Task(
    name="textvqa",
    help="TextVQA: questions about text in photographs; modeltest's score and the official one",
    data="textvqa_val.jsonl, next to textvqa_val_annotations.json; or TextVQA_0.5.1_val.json",
    prompt=by_family(
        SHORT_ANSWER,
        qwen_vl="{question} Answers:",
        qwen2_vl="{question} Answer the question using a single word or phrase.",
        vlmo=QUESTION,
    ),
    load=load,
    score=score,
    max_tokens=256,
    add_arguments=add_arguments,
    asked_by=["images"],
)
