"""VQAv2: questions about photographs, with the answers of ten people.

Three scores are in use. Each is printed with its name:

- VLMo's VQAScore (microsoft/unilm, vlmo/vlmo/gadgets/my_metrics.py and utils/write_vqa.py): by how
  many people gave exactly this answer;
- the official one (`vqa_text`): with leave-one-out;
- the accuracy of Ascend's adaptation of VLMo: whether anyone gave exactly this answer.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from services.commands.evaluation.columns import read_arrow
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
from services.commands.evaluation.vqa_text import Annotation, official_score

SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""VLMo's score of an answer that 0, 1, 2, 3, or more people gave."""
SLOWEST_COST = 1.0
"""Ascend's "mean of cost" leaves out what took this many seconds or more."""


@dataclass(frozen=True)
class Truth:
    """What is right for a question."""

    soft: Mapping[str, float]
    """VLMo's score of each answer that is not wrong."""
    annotations: Sequence[Annotation] = ()
    """The people's answers; none in VLMo's own files."""
    answer_type: str = ""


Question = tuple[str, ReadImage, str, Truth]
"""An item's id, image and question, and what is right."""


def load(arguments: argparse.Namespace) -> list[Item]:
    path: Path = arguments.data
    readers = {".json": from_official, ".arrow": from_arrow}
    if path.suffix not in readers:
        raise BadData(f"{path}: expected a .json or .arrow file")
    return [
        Item(id, (image, fill(arguments.prompt, question=question)), truth)
        for id, image, question, truth in readers[path.suffix](path, arguments)
    ]


def from_official(path: Path, arguments: argparse.Namespace) -> Iterator[Question]:
    """Yield the questions of the benchmark's files, whose images are in a folder."""
    content = read_json(path)
    subset = take(content, "data_subtype", str, str(path))
    truths = read_truths(arguments.annotations or annotations_file(path), arguments.labels)
    folder = arguments.images or path.parent / subset
    for number, row in enumerate(take(content, "questions", list, str(path))):
        place = f"{path}, question {number}"
        id = take(row, "question_id", int, place)
        if id not in truths:
            raise BadData(f"{place}: expected annotations of question {id} in --annotations")
        if not truths[id].soft:
            continue  # as in VLMo's files: no answer is among the labels
        name = f"COCO_{subset}_{take(row, 'image_id', int, place):012d}.jpg"
        image = image_file(folder / name, place)
        yield str(id), image, take(row, "question", str, place), truths[id]


def annotations_file(path: Path) -> Path:
    name = path.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    return path.with_name(name)


def read_truths(path: Path, labels: Path | None) -> dict[int, Truth]:
    """Return what is right for each question of the benchmark's annotations file.

    With a file of `labels`, VLMo's score knows only answers that are among them.
    """
    known = None if labels is None else read_labels(labels)
    truths = {}
    for number, row in enumerate(take(read_json(path), "annotations", list, str(path))):
        place = f"{path}, annotation {number}"
        answers = take(row, "answers", list, place)
        counts = Counter(take(answer, "answer", str, place) for answer in answers)
        soft = {
            answer: SOFT_SCORES[min(count, len(SOFT_SCORES) - 1)]
            for answer, count in counts.items()
            if known is None or answer in known
        }
        kind = take(row, "answer_type", str, place)
        truths[take(row, "question_id", int, place)] = Truth(soft, answers, kind)
    return truths


def read_labels(path: Path) -> set[str]:
    """Return the answers of an answer2label.txt."""
    return {take(row, "answer", str, place) for place, row in read_json_lines(path)}


def from_arrow(path: Path, arguments: argparse.Namespace) -> Iterator[Question]:
    """Yield the questions of a file of VLMo's make_arrow: each row is an image with several."""
    for row in read_arrow(path, ["image"]):
        ids = row.take("question_id", list)
        questions = row.take("questions", list)
        answers = row.take("answers", list)
        scores = row.take("answer_scores", list)
        if not len(ids) == len(questions) == len(answers) == len(scores):
            raise BadData(f"{row.place}: expected answers and scores for each question")
        image = partial(row.image, "image")
        for id, question, own, own_scores in zip(ids, questions, answers, scores, strict=True):
            yield str(id), image, question, Truth(dict(zip(own, own_scores, strict=True)))


def score_parts(one: Answered) -> dict[str, float | None]:
    """Return the three scores of an answer; None for the official one if nobody's answer is known.

    VLMo's and Ascend's compare the whole answer as it is, without white space around it.
    """
    truth: Truth = one.item.target
    output = one.output.strip()
    official = official_score(one.output, truth.annotations)
    return {
        "VQAScore": 0.0 if one.failed else truth.soft.get(output, 0.0),
        "official": (0.0 if one.failed else official) if truth.annotations else None,
        "accuracy": 0.0 if one.failed else float(output in truth.soft),
    }


def score(answered: Sequence[Answered], arguments: argparse.Namespace) -> Scores:
    parts = [score_parts(one) for one in answered]
    rows = [row("vqav2", "VQAScore (VLMo)", [part["VQAScore"] for part in parts])]
    types = [one.item.target.answer_type for one in answered]
    official = [part["official"] for part in parts]
    if None not in official:
        rows.append(row("vqav2", "acc (official)", official))
        for kind in sorted(set(types)):
            own = [value for value, of in zip(official, types, strict=True) if of == kind]
            rows.append(row(f"vqav2 {kind}", "acc (official)", own))
    rows.append(row("vqav2", "accuracy (Ascend)", [part["accuracy"] for part in parts]))
    costs = [one.seconds for one in answered if 0 < one.seconds < SLOWEST_COST]
    report = {"accuracy": rows[-1].value, "mean of cost": round(1000 * mean(costs), 3)}
    return Scores(rows, parts, report, notes_on(None in official))


def row(task: str, metric: str, values: Sequence[float | None]) -> Row:
    numbers = [value or 0.0 for value in values]
    return Row(task, len(numbers), sum(numbers), metric, mean(numbers))


def notes_on(lacks_people: bool) -> list[str]:
    notes = [
        '"mean of cost" is the mean time of the requests under a second, in ms; it compares with '
        "Ascend's only at --concurrency 1"
    ]
    if lacks_people:
        notes.append("no official score: VLMo's files do not hold the ten people's answers")
    return notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="the answers to a .json file (default: v2_mscoco_..._annotations.json next to it)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the image folder of a .json file (default: named as its subset, next to it)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="VLMo's answer2label.txt: leave out the questions that none of its answers is right "
        "for, as VLMo's files do",
    )


VQAV2 = Task(
    name="vqav2",
    help="VQAv2: questions about photographs; VLMo's VQAScore, the official score and Ascend's",
    data="v2_OpenEnded_mscoco_val2014_questions.json, or a .arrow file of VLMo",
    prompt=by_family(SHORT_ANSWER, vlmo=QUESTION),
    load=load,
    score=score,
    max_tokens=256,
    add_arguments=add_arguments,
    asked_by=["images"],
)
