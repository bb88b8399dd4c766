"""What every task of `twinlens eval` has: the run, its records, and how it is continued."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.commands.evaluation.command import evaluate
from tests.commands.evaluation.endpoint import endpoint, last_line, parse, png, run

TEXTS = ["one", "two", "three"]


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Three images, whose shade is the number of their text."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(text)
    return folder


def read(text: str, images: list[bytes]) -> str:
    return next(text for number, text in enumerate(TEXTS) if png(number) == images[0])


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


async def test_a_run_asks_records_and_prints(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    async with endpoint(read, model="m") as fake:
        arguments = ("--prompt", "Read", "--max-tokens", 7, "--seed", 5, "--concurrency", 2)
        assert await run(fake, "cer", "--data", pages, "--out", out, *arguments) == 0
    printed = capsys.readouterr().out
    assert last_line(printed) == {
        "task": "cer",
        "model": "m",
        "items": 3,
        "failed": 0,
        "scores": {"cer, CER": 0.0, "cer, WER": 0.0, "cer, exact": 1.0},
    }
    assert "| Tasks | N-Shot | Total | Pass | Metric | Value  |" in printed
    assert "| cer   | 0      | 3     | 3    | CER    | 0.0000 |" in printed
    assert "- prompt: 'Read'" in printed
    assert (out / "table.md").read_text() in printed
    assert json.loads((out / "result.json").read_text()) == last_line(printed)
    body = fake.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 7)
    assert (body["seed"], body["messages"][0]["role"]) == (5, "user")
    assert fake.texts == ["<image>Read"] * 3
    first = records(out)[0]
    assert first.pop("e2e_time") > 0
    assert first == {
        "id": "0.png",
        "input": "<image>Read",
        "output": "one",
        "error": "",
        "finish_reason": "stop",
        "score": {"character_edits": 0, "characters": 3, "word_edits": 0, "words": 1},
    }


async def test_a_rerun_asks_only_what_is_missing_or_failed(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One item is asked, one fails and counts as wrong, and one was never reached."""
    out = tmp_path / "out"
    command = ("cer", "--data", pages, "--out", out, "--concurrency", 1)

    def refuse_two(text: str, images: list[bytes]) -> str | int:
        return 400 if read(text, images) == "two" else read(text, images)

    async with endpoint(refuse_two) as fake:
        assert await run(fake, *command, "--limit", 2) == 0
        printed = capsys.readouterr().out
        assert last_line(printed)["failed"] == 1
        assert last_line(printed)["scores"]["cer, CER"] == 0.5
        assert "2, of which 1 failed and count as wrong" in printed
        assert "- first failure: item 1.png: refused" in printed
    # An interruption leaves half a line.
    with (out / "records.jsonl").open("a") as file:
        file.write('{"id": "2.p')
    async with endpoint(read) as fake:
        assert await run(fake, *command) == 0
        assert [read("", [image]) for image in sent_images(fake.bodies)] == ["two", "three"]
        assert last_line(capsys.readouterr().out)["scores"]["cer, exact"] == 1
        assert [record["output"] for record in records(out)] == TEXTS
        assert await run(fake, *command) == 0
        assert len(fake.bodies) == 2


def sent_images(bodies: list[dict[str, Any]]) -> list[bytes]:
    from tests.commands.evaluation.endpoint import text_of

    return [text_of(body)[1][0] for body in bodies]


async def test_another_setting_or_input_is_refused_unless_restarted(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("cer", "--data", pages, "--out", tmp_path / "out")
    async with endpoint(read) as fake:
        assert await run(fake, *command) == 0
        for flags, name in [
            (("--temperature", 1), "temperature"),
            (("--prompt", "x"), "prompt"),
            (("--max-tokens", 9), "max_tokens"),
        ]:
            assert await run(fake, *command, *flags) == 1
            error = capsys.readouterr().err
            assert f"another {name}" in error and "--restart" in error
        fake.model = "other"
        assert await run(fake, *command) == 1
        assert "another model ('fake', now 'other')" in capsys.readouterr().err
        assert await run(fake, *command, "--restart") == 0
        assert len(fake.bodies) == 6


async def test_a_run_without_an_answer_has_failed(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with endpoint(lambda text, images: 400) as fake:
        assert await run(fake, "cer", "--data", pages, "--out", tmp_path) == 1
    assert "no item was answered; item 0.png: refused" in capsys.readouterr().err


async def test_other_images_are_refused_unless_restarted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question's text is the same, whichever folder its image is in."""
    rows = [{"image_path": "0.png", "question": "?", "answers": "a", "type": "Doc-oriented VQA"}]
    (tmp_path / "ocr.json").write_text(json.dumps(rows))
    for folder in ("small", "large"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(png(0))
    command = ("ocrbench", "--data", tmp_path / "ocr.json", "--out", tmp_path / "out", "--images")
    async with endpoint(lambda text, images: "a") as fake:
        assert await run(fake, *command, tmp_path / "small") == 0
        assert await run(fake, *command, tmp_path / "large") == 1
        assert "another images" in capsys.readouterr().err


async def test_a_busy_server_is_asked_again(pages: Path, tmp_path: Path) -> None:
    replies: list[str | int] = [503, 429]

    def busy_at_first(text: str, images: list[bytes]) -> str | int:
        return replies.pop(0) if replies else read(text, images)

    async with endpoint(busy_at_first) as fake:
        assert await run(fake, "cer", "--data", pages, "--out", tmp_path, "--limit", 1) == 0
    assert len(fake.bodies) == 3
    assert records(tmp_path)[0]["output"] == "one"


def test_given_answers_are_scored_without_a_system(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"0.png": "one", "2.png": "thre"}))
    command = ("cer", "--data", str(pages), "--answers", str(answers))
    assert evaluate(parse(*command, "--out", str(tmp_path / "out"))) == 0
    result = last_line(capsys.readouterr().out)
    assert (result["items"], result["scores"]["cer, CER"]) == (2, 1 / 8)
    kept = str(tmp_path / "out" / "records.jsonl")
    command = ("cer", "--data", str(pages), "--answers", kept, "--out", str(tmp_path / "again"))
    assert evaluate(parse(*command)) == 0
    assert last_line(capsys.readouterr().out)["scores"] == result["scores"]


def test_without_a_server_the_error_is_one_line(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:9/v1"
    command = ("cer", "--data", str(pages), "--out", str(tmp_path), "--url", url)
    assert evaluate(parse(*command)) == 1
    assert capsys.readouterr().err.startswith(f"twinlens: nothing answers at {url}")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", '{"image": "0.png", "text": "one"}\n{"image"', "a.jsonl, line 2: expected one"),
        ("a.jsonl", '\n{"image": "0.png"}', 'a.jsonl, line 2: expected "text", a string'),
        ("a.jsonl", '{"image": "no.png", "text": ""}', "line 1: expected an image file at"),
        ("a.json", "[\n1,\n}", "a.json, line 3: expected JSON"),
        ("a.json", "{}", "a.json: expected a list of objects"),
        ("a.json", "[]", "a.json: expected at least one item"),
        (
            "a.json",
            '[{"file": "0.png", "text": ""}, {"file": "0.png", "text": ""}]',
            "0.png occurs twice",
        ),
        ("a.jsonl", None, "cannot read"),
    ],
)
async def test_a_bad_data_file_is_named_with_line_and_expectation(
    pages: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, error: str
) -> None:
    if content is not None:
        (pages / name).write_text(content)
    async with endpoint(read) as fake:
        assert await run(fake, "cer", "--data", pages / name, "--out", pages / "out") == 1
    told = capsys.readouterr().err
    assert error in told and told.count("\n") == 1
    assert not fake.bodies


async def test_the_answers_that_were_cut_off_are_counted(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with endpoint(read) as fake:
        command = ("cer", "--data", pages, "--out", tmp_path, "--max-tokens", 4)
        assert await run(fake, *command) == 0
    assert "- cut off: 1 answers" in capsys.readouterr().out


async def test_an_image_in_an_unknown_format_is_named(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pages / "1.png").write_bytes(b"BM")
    async with endpoint(read) as fake:
        assert await run(fake, "cer", "--data", pages, "--out", tmp_path, "--concurrency", 1) == 1
    assert "item 1.png: an image is not a PNG" in capsys.readouterr().err
    assert len(records(tmp_path)) == 1


async def test_a_template_without_the_question_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with endpoint(read) as fake:
        command = ("mmbench", "--data", tmp_path, "--out", tmp_path, "--prompt", "Choose.")
        assert await run(fake, *command) == 1
    assert "needs {question}" in capsys.readouterr().err
