"""TextVQA in both published formats, and modeltest's own rules."""

import json
from pathlib import Path

import pytest

from services.commands.evaluation.textvqa import modeltest_score
from services.commands.evaluation.vqa_text import official_score
from tests.commands.evaluation.endpoint import endpoint, last_line, png, run
from tests.commands.evaluation.test_vqa_text import people

ANSWERS = {
    34602: ["nous les gosses"] * 5 + ["dakota"] * 5,
    34603: ["copenhagen"] * 10,
    34604: ["3"] * 2 + ["unanswerable"] * 8,
}
REPLIES = ["Dakota.<|im_end|>junk", "Copenhagen", "three"]
"""By modeltest 1 (processed, five people), 1 (always processed) and 0.6 (two people). By the
official rules 0 (the junk stays), 0 (people agree, so its case counts) and 0.6."""


def write_lines(folder: Path) -> tuple[object, ...]:
    lines = []
    for number, id in enumerate(ANSWERS):
        (folder / f"{id}.png").write_bytes(png(number))
        row = {"image": f"{id}.png", "question": f"q{number}?", "question_id": id}
        lines.append(json.dumps(row | {"answer": "x"}))
    (folder / "textvqa_val.jsonl").write_text("\n".join(lines))
    annotations = [{"question_id": id, "answers": people(*own)} for id, own in ANSWERS.items()]
    file = folder / "textvqa_val_annotations.json"
    file.write_text(json.dumps({"annotations": annotations}))
    return (folder / "textvqa_val.jsonl",)


def write_official(folder: Path) -> tuple[object, ...]:
    rows = []
    for number, (id, own) in enumerate(ANSWERS.items()):
        (folder / f"i{id}.jpg").write_bytes(png(number))
        row = {"image_id": f"i{id}", "question": f"q{number}?", "question_id": id, "answers": own}
        rows.append(row)
    file = folder / "TextVQA_0.5.1_val.json"
    file.write_text(json.dumps({"dataset_type": "val", "data": rows}))
    return (file, "--images", folder)


@pytest.mark.parametrize("write", [write_lines, write_official])
async def test_each_published_format(
    write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(text: str, images: list[bytes]) -> str:
        return next(REPLIES[number] for number in range(3) if images == [png(number)])

    async with endpoint(reply, model="qwen_vl_chat") as fake:
        assert await run(fake, "textvqa", "--data", *write(tmp_path), "--out", tmp_path / "o") == 0
    assert sorted(fake.texts) == [f"<image>q{number}? Answers:" for number in range(3)]
    printed = capsys.readouterr().out
    two_people = (8 * (2 / 3) + 2 * (1 / 3)) / 10
    assert last_line(printed)["scores"] == {
        "textvqa, acc (modeltest)": pytest.approx((2 + two_people) / 3),
        "textvqa, acc (official)": pytest.approx(two_people / 3),
    }
    assert "'{question} Answers:'" in printed


@pytest.mark.parametrize(
    ("output", "answers", "modeltest", "official"),
    [
        # An empty answer is compared as "-1", whose minus becomes a space.
        ("", ["1"] * 9 + ["2"], 1, 0),
        ("</s>yes", ["yes"] * 9 + ["no"], 0, 0),
        ("yes###no", ["yes"] * 9 + ["no"], 1, 0),
        # Their full-width bar stands before the marker only, so the real token is not cut.
        ("yes<｜eot_id|>", ["yes"] * 9 + ["no"], 1, 0),
        ("yes<|eot_id|>", ["yes"] * 9 + ["no"], 0, 0),
        # The people's answers keep their articles and capitals.
        ("the cat", ["the cat"] * 9 + ["dog"], 0, 1),
        ("cat", ["Cat"] * 9 + ["dog"], 0, 1),
        # They lose their punctuation only if they differ.
        ("coca-cola", ["coca-cola"] * 10, 0, 1),
        ("coca-cola", ["coca-cola"] * 9 + ["pepsi"], 1, 1),
        ("x" * 2049, ["x" * 2049] * 9 + ["y"], 0, 1),
        ("a\tb", ["b"] * 9 + ["a"], 1, 1),
    ],
)
def test_how_the_two_scores_differ(
    output: str, answers: list[str], modeltest: float, official: float
) -> None:
    assert modeltest_score(output, people(*answers)) == modeltest
    assert official_score(output, people(*answers)) == official


async def test_a_question_without_answers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = write_lines(tmp_path)
    (tmp_path / "textvqa_val_annotations.json").write_text('{"annotations": []}')
    async with endpoint(lambda text, images: "") as fake:
        assert await run(fake, "textvqa", "--data", path, "--out", tmp_path / "o") == 1
    told = capsys.readouterr().err
    assert "textvqa_val_annotations.json: expected answers to question 34602" in told
