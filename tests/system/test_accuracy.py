"""The embedded model reads as well as it should, however it is served.

The pages are drawn images of tests/golden/reading. Each two values of two settings (precision,
tensor parallelism, padding to buckets, vision replicas) occur together in one of the systems.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from benchmarks.serving import ROOT
from services.commands.evaluation.cer import edits, rate
from services.commands.sample import SAMPLE_PROMPT
from tests.system.running import Running, ask_about, text_of

pytestmark = pytest.mark.system
READING = ROOT / "tests" / "golden" / "reading"
PAGES = [json.loads(line) for line in (READING / "pages.jsonl").read_text().splitlines()]
FLOAT32 = "--dtype float32"
MOST_ERRORS = 0.02
"""Character error rate in float32, which is 0.0166: 12 edits in 723 characters."""
MOST_ERRORS_ROUNDED = 0.025
"""In bfloat16 and int8, whose rounding differs between processors."""
BUCKETS = "--vision-buckets 64,256,512"
"""In patches. The pages have 16 to 480, so that each bucket is used and most pages are padded."""


LARGEST_DIFFERENCE = 1e-3
"""The largest difference of a log-probability in float32. Sums in another order differ by about
1e-5."""


@dataclass(frozen=True)
class Answer:
    """What a system reads in a page, and the log-probability of each token."""

    text: str
    logprobs: list[float]


def read_all(arguments: str) -> list[Answer]:
    """Return what a system with these settings reads in the pages, eight at a time."""
    with Running(*arguments.split()) as system, ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda page: read(system, page["image"]), PAGES))


def read(system: Running, image: str) -> Answer:
    status, answer = system.chat(ask_about(READING / image, SAMPLE_PROMPT), logprobs=True)
    assert status == 200, answer
    tokens = answer["choices"][0]["logprobs"]["content"]
    return Answer(text_of(answer), [token["logprob"] for token in tokens])


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def error_rate(answers: list[Answer]) -> float:
    pairs = zip(texts(answers), PAGES, strict=True)
    return rate([edits(text, page["text"]) for text, page in pairs], "character")


@pytest.fixture(scope="module")
def plain() -> list[Answer]:
    """What the system reads in float32, with one rank, one replica and no padding."""
    return read_all(FLOAT32)


def test_the_model_reads_well(plain: list[Answer]) -> None:
    assert error_rate(plain) <= MOST_ERRORS, texts(plain)


def test_ranks_padding_and_replicas_change_nothing(plain: list[Answer]) -> None:
    """The text alone would not show a wrong mask: the model reads on despite small errors."""
    answers = read_all(f"{FLOAT32} --tp 2 --vision 3 {BUCKETS}")
    assert texts(answers) == texts(plain)
    for answer, expected in zip(answers, plain, strict=True):
        assert answer.logprobs == pytest.approx(expected.logprobs, rel=0, abs=LARGEST_DIFFERENCE)


@pytest.mark.parametrize(
    "arguments",
    [
        f"--dtype bfloat16 --vision 3 {BUCKETS}",
        "--dtype bfloat16 --tp 2",
        f"--quantization int8 {BUCKETS}",
        "--quantization int8 --tp 2 --vision 3",
    ],
)
def test_rounding_costs_little(arguments: str) -> None:
    answers = read_all(arguments)
    assert error_rate(answers) <= MOST_ERRORS_ROUNDED, texts(answers)
