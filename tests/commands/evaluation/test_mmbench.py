"""MMBench's circular evaluation, and which option an answer chooses."""

import csv
from pathlib import Path

import pytest

from services.commands.evaluation.choices import chosen_option
from tests.commands.evaluation.endpoint import endpoint, last_line, png, png_base64, run

OPTIONS = {"A": "a cat", "B": "Dog", "C": "two dogs"}
PROMPT = """<image>Hint: look
Question: which?
Options:
A. cat
B. dog
Please select the correct answer from the options above. 
"""
ROWS = [
    # index, image, hint, the options, the answer, and two categories
    ["7", png_base64(7), "look", "cat", "dog", "A", "coarse", "style"],
    ["1000007", "7", "look", "dog", "cat", "B", "coarse", "style"],
    ["8", png_base64(8), "", "None", "dog", "B", "coarse", "scene"],
    ["1000008", "8", "", "dog", "None", "A", "coarse", "scene"],
]
"""Two questions with two passes. The second pass refers to the image of the first. An option "None"
is a missing cell for pandas, so question 8 has one option only."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "MMBench_DEV_EN.tsv"
    header = ["index", "image", "hint", "A", "B", "answer", "l2-category", "category", "question"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        # The first passes stand before the second ones.
        for row in (ROWS[0], ROWS[2], ROWS[1], ROWS[3]):
            writer.writerow([*row, "which?"])
    return path


async def test_a_question_is_right_if_every_pass_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model always sees the dog, so question 8 is right and question 7 is not."""
    asked = []

    def reply(text: str, images: list[bytes]) -> str:
        asked.append((text, images))
        return "A" if "A. dog" in text else "B."

    async with endpoint(reply) as fake:
        command = ("mmbench", "--data", data, "--out", tmp_path / "o", "--concurrency", 1)
        assert await run(fake, *command) == 0
    assert asked[0] == (PROMPT, [png(7)])
    assert [images for _, images in asked] == [[png(7)], [png(7)], [png(8)], [png(8)]]
    assert "A. None" not in asked[2][0] and "Hint" not in asked[2][0]
    assert last_line(capsys.readouterr().out)["scores"] == {
        "mmbench, acc (circular)": 0.5,
        "mmbench, acc (first pass)": 0.5,
        "mmbench, acc (all passes)": 0.5,
        "coarse, acc (circular)": 0.5,
        "scene, acc (circular)": 1.0,
        "style, acc (circular)": 0.0,
    }


async def test_one_right_pass_is_not_enough(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model always answers A, which is right in one pass of each question."""
    async with endpoint(lambda text, images: "A") as fake:
        assert await run(fake, "mmbench", "--data", data, "--out", tmp_path / "o") == 0
    scores = last_line(capsys.readouterr().out)["scores"]
    assert scores["mmbench, acc (circular)"] == 0
    assert scores["mmbench, acc (first pass)"] == 0.5


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("I think it is B, surely", "B"),
        ("B is the one that I would choose here", ""),  # not among the last four words
        ("A or B", ""),
        ("b", ""),
        ("Z", "Z"),
        ("Cannot determine the answer: B", "Z"),
        ("The correct answer is **B**, because A does not fit the picture at all", "B"),
        ("the answer is E", ""),
        ("a dog!", "B"),
        ("a cat and a dog", ""),
        ("it is a dog " + "really " * 10, ""),  # too long to be searched for texts
        ("", ""),
    ],
)
def test_which_option_an_answer_chooses(answer: str, chosen: str) -> None:
    assert chosen_option(answer, OPTIONS) == chosen


async def test_an_answer_that_is_no_option_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text(data.read_text().replace("\tB\tcoarse\tscene", "\tD\tcoarse\tscene"))
    async with endpoint(lambda text, images: "A") as fake:
        assert await run(fake, "mmbench", "--data", data, "--out", tmp_path / "o") == 1
    assert "line 3: expected the letter of an option as the answer" in capsys.readouterr().err
