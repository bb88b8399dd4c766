"""The answers to visual questions as the VQA benchmark compares them.

The rules are those of the official script (github.com/GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation/vqaEval.py), its slips included, because scores are comparable
only with them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from services.commands.evaluation.task import mean

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
"""A period before anything but a digit. The script also means to keep one after a digit, but its
look-behind is written wrongly and has no effect."""
MOST_PERIODS = 32
"""The script passes the flag re.UNICODE, which is 32, where the number of replacements stands."""
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
COMPLETED = {
    word[: found.start()] + word[found.end() :]: word
    for word in CONTRACTIONS.split()
    for found in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
"""A contraction with one of its apostrophes left out, and the whole one; and the script's one entry
that does the opposite. Its entries with capitals are never found, because words are lower-case."""
ENOUGH = 3
"""An answer that this number of other people gave is fully right."""
Annotation = Mapping[str, Any]
"""One person's `answer`, with what else the file says about it, such as `answer_id`."""


def one_line(text: str) -> str:
    """Return a text without white space around it, and with spaces for line breaks and tabs."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(text: str) -> str:
    """Return a text with its punctuation removed or replaced by spaces.

    A mark is removed if it stands next to a space anywhere in the text, or if the text has a comma
    between digits; otherwise a space replaces it.
    """
    has_number = DIGIT_COMMA_DIGIT.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        is_removed = has_number or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_removed else " ")
    return PERIOD.sub("", stripped, count=MOST_PERIODS)


def plain_words(text: str) -> str:
    """Return a text in lower case, with digits for number words, and without articles."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(COMPLETED.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(answer: str, annotations: Sequence[Annotation]) -> float:
    """Return how right an answer is, in [0, 1].

    For each person it counts how many of the others gave this answer; three are enough. "Others"
    are the annotations that differ from that person's, so these need distinct ids.
    """
    shares = []
    for own in annotations:
        same = sum(other != own and other["answer"] == answer for other in annotations)
        shares.append(min(1.0, same / ENOUGH))
    return mean(shares)


def with_answers(annotations: Sequence[Annotation], answers: Sequence[str]) -> list[Annotation]:
    """Return the annotations with other answers."""
    return [{**own, "answer": answer} for own, answer in zip(annotations, answers, strict=True)]


def official_score(output: str, annotations: Sequence[Annotation]) -> float:
    """Return the score of an answer by the official script, in [0, 1].

    Both sides are processed, unless all people gave the same answer.
    """
    output = one_line(output)
    answers = [one_line(own["answer"]) for own in annotations]
    if len(set(answers)) > 1:
        output = plain_words(without_punctuation(output))
        answers = [plain_words(without_punctuation(answer)) for answer in answers]
    return leave_one_out(output, with_answers(annotations, answers))
