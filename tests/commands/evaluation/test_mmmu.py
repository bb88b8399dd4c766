"""MMMU in both published formats, with both scores."""

import csv
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from services.commands.evaluation.mmmu_official import is_open_answer_right, official_option
from tests.commands.evaluation.endpoint import endpoint, last_line, png, png_base64, run

QUESTIONS = [
    ("See <image 1> and <image 2>: which?", ["<image 2>", "red"], "B", [1, 2]),
    ("What color?", ["red", "blue"], "A", [3]),
    ("How much is it?", [], "['3.50', '3.5 dollars']", [4]),
]
TEXTS = [
    "Question: See <image> and <image>: which?\nOptions:\nA. <image>\nB. red\n"
    "Please select the correct answer from the options above. \n",
    "<image>Question: What color?\nOptions:\nA. red\nB. blue\n"
    "Please select the correct answer from the options above. \n",
    "<image>Question: How much is it?\n",
]
SENT = [[png(1), png(2), png(2)], [png(3)], [png(4)]]
REPLIES = ["(B)", "Red", "so it is 3.5"]
"""By exact matching right, right (the text), and wrong (not the list as a text). By the official
rules right, wrong (too short for its text), and right (the number)."""


def write_tsv(folder: Path) -> Path:
    path = folder / "MMMU_DEV_VAL.tsv"
    header = ["index", "question", "A", "B", "answer", "category", "split", "image"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        for number, (question, options, answer, shades) in enumerate(QUESTIONS):
            images = [png_base64(shade) for shade in shades]
            image = images[0] if len(images) == 1 else repr(images)
            split = "dev" if number == 2 else "validation"
            cells = options or ["", ""]
            writer.writerow([number, question, *cells, answer, "Art", split, image])
    return path


def write_folder(folder: Path) -> Path:
    rows = []
    for number, (question, options, answer, shades) in enumerate(QUESTIONS):
        row = {f"image_{place}": None for place in range(1, 8)}
        for place, shade in enumerate(shades, 1):
            row[f"image_{place}"] = {"bytes": png(shade), "path": "x.png"}
        kind = "multiple-choice" if options else "open"
        split = "dev" if number == 2 else "validation"
        row |= {"id": f"{split}_Art_{number}", "question": question, "question_type": kind}
        rows.append(row | {"options": repr(options), "answer": answer})
    (folder / "Art").mkdir()
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "Art" / "validation-00000-of-00001.parquet")
    parquet.write_table(table, folder / "Art" / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("write", [write_tsv, write_folder])
async def test_each_published_format(
    write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}

    def reply(text: str, images: list[bytes]) -> str:
        asked[text] = images
        return REPLIES[TEXTS.index(text)]

    async with endpoint(reply) as fake:
        assert await run(fake, "mmmu", "--data", write(tmp_path), "--out", tmp_path / "o") == 0
    assert asked == dict(zip(TEXTS, SENT, strict=True))
    assert last_line(capsys.readouterr().out)["scores"] == {
        "mmmu, acc (exact)": pytest.approx(2 / 3),
        "mmmu, acc (official)": pytest.approx(2 / 3),
        "mmmu dev, acc (exact)": 0,
        "mmmu dev, acc (official)": 1,
        "mmmu validation, acc (exact)": 1,
        "mmmu validation, acc (official)": 0.5,
        "Art, acc (exact)": pytest.approx(2 / 3),
        "Art, acc (official)": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("A.", "A"),
        ("(A) no, (B)", "B"),
        ("A, that is (B)", "B"),  # brackets count more
        ("B or A ?", "A"),
        ("cat", ""),  # a text counts only in an answer of more than five words
        ("I see a cat and then a dog", "B"),
        ("Banana", ""),
    ],
)
def test_the_option_that_the_official_script_reads(answer: str, chosen: str) -> None:
    assert official_option(answer, {"A": "cat", "B": "dog"}) == chosen


@pytest.mark.parametrize(
    ("answer", "right", "is_right"),
    [
        ("the result is 1,000.", ["1000"], True),
        ("x = 2\ny = 3", ["3"], True),
        ("x = 2\ny = 3", ["2"], False),  # only in the last line does "=" indicate
        ("final answer is about 3.14159", ["3.14"], True),
        ("Blue", ["light blue"], False),
        ("light Blue", ["blue", "x1"], True),
        ("bb", ["b"], False),  # a single letter must stand at a space
        ("a b", ["b"], True),
        ("so 1e3", ["1000"], True),
    ],
)
def test_open_answers_by_the_official_script(answer: str, right: list[str], is_right: bool) -> None:
    assert is_open_answer_right(answer, right) is is_right


async def test_an_image_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tsv(tmp_path)
    path.write_text(path.read_text().replace("What color?", "What is in <image 5>?"))
    async with endpoint(lambda text, images: "A") as fake:
        assert await run(fake, "mmmu", "--data", path, "--out", tmp_path / "o") == 1
    assert "line 3: expected image 5, which the text names" in capsys.readouterr().err
