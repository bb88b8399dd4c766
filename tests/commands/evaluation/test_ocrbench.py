"""OCRBench in each of its published formats, and its rules against cases worked by hand."""

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from services.commands.evaluation.ocrbench import FORMULAS, is_right, report
from tests.commands.evaluation.endpoint import endpoint, last_line, png, png_base64, run

ROWS = [
    ("what is written in the image?", ["BREAD", "bread roll"], "Artistic Text Recognition"),
    ("what is the number?", ["9557"], "Digit String Recognition"),
    ("write the formula", ["\\frac { 1 } { 2 }\n"], FORMULAS),
]
REPLIES = ["It says Bread.", "9 557", "$\\frac{1} {2}$"]
"""Right: in lower case. Wrong: spaces count. Right: in formulas they do not."""
REPORT = {
    "Text Recognition": 1,
    "Scene Text-centric VQA": 0,
    "Doc-oriented VQA": 0,
    "Key Information Extraction": 0,
    FORMULAS: 1,
    "Final Score": 2,
    "Final Score Norm": 0.2,
}


def write_tsv(folder: Path) -> Path:
    path = folder / "OCRBench.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "question", "answer", "category"])
        for number, (question, answers, category) in enumerate(ROWS):
            writer.writerow([number, png_base64(number), question, repr(answers), category])
        file.write("\n")
    return path


def write_parquet(folder: Path) -> Path:
    rows = [
        {
            "dataset": "d",
            "question": question,
            "question_type": category,
            "answer": answers,
            "image": {"bytes": png(number), "path": None},
        }
        for number, (question, answers, category) in enumerate(ROWS)
    ]
    path = folder / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_json(folder: Path) -> Path:
    rows = []
    for number, (question, answers, category) in enumerate(ROWS):
        name = f"set/{number}.png"
        (folder / "OCRBench_Images" / "set").mkdir(parents=True, exist_ok=True)
        (folder / "OCRBench_Images" / name).write_bytes(png(number))
        row = {"dataset_name": "set", "image_path": name, "question": question, "id": number}
        rows.append(row | {"answers": answers, "type": category})
    path = folder / "OCRBench.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("write", [write_tsv, write_parquet, write_json])
async def test_each_published_format(
    write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(text: str, images: list[bytes]) -> str:
        return next(REPLIES[number] for number in range(3) if images == [png(number)])

    async with endpoint(reply) as fake:
        out = tmp_path / "out"
        assert await run(fake, "ocrbench", "--data", write(tmp_path), "--out", out) == 0
    assert sorted(fake.texts) == sorted(f"<image>{question}" for question, _, _ in ROWS)
    printed = capsys.readouterr().out
    result = last_line(printed)
    assert result["report"] == REPORT
    assert json.dumps(REPORT, indent=4) in printed
    assert result["scores"]["ocrbench, acc"] == pytest.approx(2 / 3)
    assert "counts right answers of 3" in printed


async def test_a_parquet_file_without_images_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "?", "answer": ["a"]}]), path)
    async with endpoint(lambda text, images: "a") as fake:
        assert await run(fake, "ocrbench", "--data", path, "--out", tmp_path / "out") == 1
    assert 'a.parquet: expected a column "image"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "category", "answers", "right"),
    [
        (" THE\nend", "Doc-oriented VQA", ["the end"], True),
        ("the  end", "Doc-oriented VQA", ["the end"], False),
        ("x", "Doc-oriented VQA", ["y", "X"], True),
        ("X^2", FORMULAS, ["x^2"], False),
        ("a \n+ b", FORMULAS, ["a + b"], True),
    ],
)
def test_what_counts_as_right(output: str, category: str, answers: list[str], right: bool) -> None:
    assert is_right(output, (category, answers)) is right


def test_the_final_score_is_the_sum_of_the_groups_and_its_norm_a_tenth() -> None:
    """The published scores of RolmOCR: 263 + 176 + 170 + 178 + 62 = 849, and 84.9."""
    counts = {
        "Handwriting Recognition": 263,
        "Scene Text-centric VQA": 176,
        "Doc-oriented VQA": 170,
        "Key Information Extraction": 178,
        FORMULAS: 62,
    }
    categories = [category for category, count in counts.items() for _ in range(count)]
    made = report(categories, [True] * len(categories))
    assert list(made) == list(REPORT)
    assert (made["Text Recognition"], made["Final Score"], made["Final Score Norm"]) == (
        263,
        849,
        84.9,
    )


@pytest.mark.parametrize(
    ("cells", "error"),
    [
        (["0", "aWk=" * 20, "q", "['a']"], "line 2: expected 5 cells as in the first line, not 4"),
        (["0", "aWk=" * 20, "q", "['a']", "Other"], "line 2: expected one of OCRBench's ten"),
        (["0", "7", "q", "['a']", FORMULAS], "line 2: expected an image in base64, or the index"),
        (
            ["0", "aWk=" * 20, "", "['a']", FORMULAS],
            'line 2: expected a value in column "question"',
        ),
        (["0", "!" * 80, "q", "['a']", FORMULAS], "line 2: expected an image in base64"),
    ],
)
async def test_a_bad_row_is_named(
    cells: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.tsv"
    header = "index\timage\tquestion\tanswer\tcategory"
    path.write_text("\n".join([header, "\t".join(cells)]))
    async with endpoint(lambda text, images: "a") as fake:
        assert await run(fake, "ocrbench", "--data", path, "--out", tmp_path) == 1
    assert f"{path}, {error}" in capsys.readouterr().err
