"""What the soak asks: seeded questions, and calls that ask them through both APIs.

The calls have every manner that a client may have.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

from tests.soak.attacks import GRPC, HTTP
from tests.system.poisoned import COLOURS, LLM_MARKS, PREPROCESS_MARK, coloured

SIZES = ((56, 56), (84, 56), (112, 112), (100, 180), (224, 224), (300, 260))
SIZE_WEIGHTS = (6, 4, 4, 3, 2, 1)
NUM_IMAGES = (0, 1, 2, 3, 4)
NUM_IMAGES_WEIGHTS = (30, 40, 14, 8, 8)
LOSSLESS = ("PNG", "WEBP")
MANNERS = {"patient": 76, "slow": 6, "hangs_up": 8, "hurried": 5, "mistaken": 5}
MISTAKES = ("no_image", "cut_off", "max_tokens", "model", "temperature", "empty")
SENTENCE = (
    "read the receipt and tell me what it says about a total of items sold on "
    "this page in one short line please now"
)
STOP_STRINGS = ("e", "t", "0", "an", ". ", "\n", "e ", "s", "th", "No")
PATIENCE_SECONDS = 60.0
POISON_SECONDS = 300.0
"""The deadline of a poison. It must fail before, because of what it does."""
POISONED_ROLES = ("preprocess", "vision", "llm")
POISONS = (*POISONED_ROLES, *HTTP, *GRPC)
SAMPLED_TOP_K = 8
"""Few enough that a client can ask for the log-probabilities of all candidates."""


@dataclass(frozen=True)
class Picture:
    seed: int
    width: int
    height: int
    is_lossy: bool


@dataclass(frozen=True)
class Question:
    """Everything that decides an answer."""

    text: str
    pictures: tuple[Picture, ...]
    max_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    temperature: float
    seed: int


@dataclass(frozen=True)
class Call:
    """One time that a question is asked, and the manner of asking."""

    number: int
    question: Question
    api: str
    is_streamed: bool
    manner: str
    deadline: float
    file_format: str
    """The format of the lossless pictures: the same pixels in another file get the same answer."""
    hang_up_pieces: int = 0
    """The number of pieces after which the client hangs up; 0: after `hang_up_seconds`."""
    hang_up_seconds: float = 0.0
    mistake: str = ""
    poison: str = ""
    """The role whose processes end when they work on the call, or an attack on an API."""


def make_calls(
    seed: int,
    number: int,
    num_questions: int,
    poison_every: int = 0,
    poisons: Sequence[str] = POISONS,
) -> list[Call]:
    """Return calls that depend on the arguments only.

    Later questions are first asked later, so that new ones come until the end. One call of
    `poison_every` is a poison, of each kind in turn.
    """
    calls = make_harmless_calls(seed, number, num_questions)
    for n in range(poison_every - 1, number, poison_every) if poison_every else ():
        kind = poisons[n // poison_every % len(poisons)]
        calls[n] = replace(
            calls[n], manner="poison", poison=kind, mistake="poison", deadline=POISON_SECONDS
        )
    return calls


def make_harmless_calls(seed: int, number: int, num_questions: int) -> list[Call]:
    draw = random.Random(seed)
    questions = [make_question(draw) for _ in range(num_questions)]
    return [make_call(draw, n, choose(draw, questions, (n + 1) / number)) for n in range(number)]


def choose(draw: random.Random, questions: list[Question], progress: float) -> Question:
    """Return one of the questions introduced by now: a recent one, or any."""
    known = max(1, round(progress * len(questions)))
    return questions[draw.randrange(max(0, known - 40) if draw.random() < 0.7 else 0, known)]


def make_question(draw: random.Random) -> Question:
    sizes = draw.choices(SIZES, SIZE_WEIGHTS, k=draw.choices(NUM_IMAGES, NUM_IMAGES_WEIGHTS)[0])
    pictures = tuple(
        Picture(draw.randrange(2**32), *size, is_lossy=draw.random() < 0.3) for size in sizes
    )
    is_sampled = draw.random() < 0.4
    return Question(
        text=" ".join(draw.choices(SENTENCE.split(), k=draw.choice((2, 5, 10, 40)))),
        pictures=pictures,
        max_tokens=draw.choice((1, 4, 8, 16, 24, 48)),
        ignore_eos=draw.random() < 0.7,
        stop=tuple(draw.sample(STOP_STRINGS, draw.randint(1, 3))) if draw.random() < 0.15 else (),
        temperature=draw.choice((0.6, 1.0, 1.5)) if is_sampled else 0.0,
        seed=draw.randrange(2**62) if is_sampled else 0,
    )


def make_call(draw: random.Random, number: int, question: Question) -> Call:
    manner = draw.choices(list(MANNERS), list(MANNERS.values()))[0]
    is_streamed = manner == "slow" or draw.random() < 0.6
    by_pieces = is_streamed and draw.random() < 0.5
    return Call(
        number=number,
        question=question,
        api=draw.choice(("http", "grpc")),
        is_streamed=is_streamed,
        manner=manner,
        deadline=draw.uniform(0.02, 1.0) if manner == "hurried" else PATIENCE_SECONDS,
        file_format=draw.choice(LOSSLESS),
        hang_up_pieces=draw.randint(1, 12) if by_pieces else 0,
        hang_up_seconds=draw.uniform(0.001, 0.8),
        mistake=draw.choice(MISTAKES) if manner == "mistaken" else "",
    )


@lru_cache(maxsize=1000)
def picture_file(picture: Picture, file_format: str) -> bytes:
    """Return a file of blocks of random colours, which differ by seed and are quickly packed."""
    cells = np.random.default_rng(picture.seed).integers(
        0, 256, (picture.height // 4, picture.width // 4, 3), np.uint8
    )
    image = Image.fromarray(cells.repeat(4, axis=0).repeat(4, axis=1))
    target = BytesIO()
    if picture.is_lossy:
        image.save(target, "JPEG", quality=85)
    else:
        image.save(
            target,
            file_format,
            **({"lossless": True} if file_format == "WEBP" else {"compress_level": 1}),
        )
    return target.getvalue()


def files_of(call: Call) -> list[bytes]:
    files = [picture_file(picture, call.file_format) for picture in call.question.pictures]
    match call.mistake:
        case "no_image":
            return [*files, b"this is not an image"]
        case "cut_off":
            whole = picture_file(Picture(call.number, 112, 112, is_lossy=False), "PNG")
            return [*files, whole[: len(whole) // 2]]
    return [*files, coloured(COLOURS["killed"])] if call.poison == "vision" else files


def text_of(call: Call) -> str:
    marks = {"preprocess": PREPROCESS_MARK, "llm": LLM_MARKS["killed"]}
    return call.question.text + marks.get(call.poison, "")
