"""VQAv2 in the benchmark's own format and in VLMo's, with three scores worked by hand."""

import json
from pathlib import Path

import pyarrow
import pytest

from tests.commands.evaluation.endpoint import endpoint, last_line, png, run
from tests.commands.evaluation.test_vqa_text import people

ANSWERS = {
    1001: ("yes/no", ["yes"] * 7 + ["no"] * 3),
    1002: ("number", ["2"] * 1 + ["3"] * 9),
    2001: ("other", ["The dog"] * 2 + ["cat"] * 8),
}
REPLIES = {1001: "no", 1002: "2", 2001: "dog"}
"""VLMo: 0.9 (three people), 0.3 (one) and 0 (nobody said exactly this).
Official: (3 * 2/3 + 7 * 1)/10 = 0.9; 9/30 = 0.3; (2 * 1/3 + 8 * 2/3)/10 = 0.6.
Ascend: 1, 1, 0."""


def write_official(folder: Path) -> tuple[object, ...]:
    images = folder / "val2014"
    images.mkdir()
    questions, annotations = [], []
    for number, (id, (kind, own)) in enumerate(ANSWERS.items()):
        (images / f"COCO_val2014_{number:012d}.jpg").write_bytes(png(number))
        questions.append({"question_id": id, "image_id": number, "question": f"q{id}"})
        annotations.append({"question_id": id, "answer_type": kind, "answers": people(*own)})
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(
        json.dumps({"annotations": annotations})
    )
    return (file,)


def write_arrow(folder: Path) -> tuple[object, ...]:
    """Two rows: the first image has two questions."""
    soft = {
        1001: {"yes": 1.0, "no": 0.9},
        1002: {"2": 0.3, "3": 1.0},
        2001: {"cat": 1.0, "The dog": 0.6},
    }
    rows = [
        {
            "image": png(number),
            "questions": [f"q{id}" for id in ids],
            "answers": [list(soft[id]) for id in ids],
            "answer_labels": [[0, 1] for _ in ids],
            "answer_scores": [list(soft[id].values()) for id in ids],
            "image_id": number,
            "question_id": ids,
            "split": "val",
        }
        for number, ids in enumerate([[1001, 1002], [2001]])
    ]
    table = pyarrow.Table.from_pylist(rows)
    path = folder / "vqav2_rest_val.arrow"
    with pyarrow.RecordBatchFileWriter(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return (path,)


def reply(text: str, images: list[bytes]) -> str:
    return next(answer for id, answer in REPLIES.items() if f"q{id}" in text)


@pytest.mark.parametrize("write", [write_official, write_arrow])
async def test_each_published_format(
    write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with endpoint(reply, model="vlmo_base") as fake:
        assert await run(fake, "vqav2", "--data", *write(tmp_path), "--out", tmp_path / "o") == 0
    assert sorted(fake.texts) == ["<image>q1001", "<image>q1002", "<image>q2001"]
    printed = capsys.readouterr().out
    result = last_line(printed)
    scores = result["scores"]
    assert scores["vqav2, VQAScore (VLMo)"] == pytest.approx(1.2 / 3)
    assert scores["vqav2, accuracy (Ascend)"] == pytest.approx(2 / 3)
    assert result["report"]["accuracy"] == pytest.approx(2 / 3)
    assert 0 < result["report"]["mean of cost"] < 1000
    if write is write_official:
        assert scores["vqav2, acc (official)"] == pytest.approx((0.9 + 0.3 + 0.6) / 3)
        assert scores["vqav2 number, acc (official)"] == pytest.approx(0.3)
    else:
        assert "vqav2, acc (official)" not in scores
        assert "no official score" in printed


async def test_labels_leave_out_the_questions_that_a_classifier_cannot_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "answer2label.txt"
    labels.write_text('{"answer": "yes", "label": 0}\n{"answer": "3", "label": 1}\n')
    command = ("vqav2", "--data", *write_official(tmp_path), "--labels", labels)
    async with endpoint(reply) as fake:
        assert await run(fake, *command, "--out", tmp_path / "o") == 0
    result = last_line(capsys.readouterr().out)
    assert result["items"] == 2
    assert result["scores"]["vqav2, VQAScore (VLMo)"] == 0
