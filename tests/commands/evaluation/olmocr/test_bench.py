"""`twinlens eval olmocr-bench` from PDFs to the table, and on another system's answers."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from services.commands.evaluation.command import evaluate
from services.commands.evaluation.olmocr.bench import read_bench
from services.commands.evaluation.olmocr.katex import Katex, NoMath
from services.commands.evaluation.olmocr.pages import page_image
from services.commands.evaluation.olmocr.scoring import confidence_interval
from services.commands.evaluation.task import BadItem
from tests.commands.evaluation.endpoint import endpoint, last_line, parse, run
from tests.foreign import foreign

SAMPLE = "olmocr-bench-sample"
PRESENT = {"pdf": "a.pdf", "page": 1, "id": "1", "type": "present", "text": "wanted"}


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Two PDFs, of which one is none, and tests of each."""
    folder = tmp_path / "bench"
    (folder / "pdfs" / "sub").mkdir(parents=True)
    Image.new("L", (300, 400), 255).save(folder / "pdfs" / "a.pdf")
    (folder / "pdfs" / "sub" / "broken.pdf").write_bytes(b"no PDF")
    tests = [
        PRESENT,
        PRESENT | {"id": "3", "text": "other"},
        PRESENT | {"pdf": "sub/broken.pdf", "id": "2", "type": "absent"},
    ]
    (folder / "first.jsonl").write_text("\n\n".join(map(json.dumps, tests)))
    return folder


def records(out: Path) -> dict[str, Any]:
    lines = (out / "records.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


async def test_pages_are_asked_scored_and_written(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bytes] = []

    def reply(text: str, images: list[bytes]) -> str:
        seen.extend(images)
        return "wanted" if len(seen) % 2 else "other"

    out = tmp_path / "out"
    async with endpoint(reply) as fake:
        arguments = ("--longest-side", 200, "--repeats", 3, "--prompt", "Read")
        command = ("olmocr-bench", "--data", bench, "--out", out, "--concurrency", 1)
        assert await run(fake, *command, *arguments) == 0
    assert [Image.open(io.BytesIO(image)).size for image in seen] == [(150, 200)] * 3
    assert sorted(body["seed"] for body in fake.bodies) == [1234, 1235, 1236]
    result = last_line(capsys.readouterr().out)
    assert result["failed"] == 3
    assert result["scores"] == {
        "absent, rate of type": 0.0,
        "baseline, rate of type": 0.5,
        "present, rate of type": 0.5,  # 2 and 1 of the 3 answers
        "baseline, rate of file": 0.5,
        "first.jsonl, rate of file": pytest.approx(1 / 3),
        "olmocr-bench, mean of files": pytest.approx(5 / 12),
    }
    assert (out / "answers" / "a_pg1_repeat1.md").read_text() == "wanted"
    found = records(out)
    assert found["a_pg1_repeat2.md"]["score"]["failed"] == {"1": "'wanted' is missing"}
    assert "PdfiumError" in found["sub/broken_pg1_repeat1.md"]["error"]
    assert (out / "answers" / "sub" / "broken_pg1_repeat3.md").read_text() == ""


def test_the_verdicts_on_another_systems_answers_are_the_official_ones(tmp_path: Path) -> None:
    """The official run had the 87 tests that need no browser, and a baseline test of each PDF."""
    sample = foreign(SAMPLE)
    official = json.loads((sample / "verdicts.json").read_text())
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "pdfs").symlink_to(sample / "pdfs")
    tests = (sample / "dataset.jsonl").read_text().splitlines()
    without_math = [line for line in tests if '"type": "math"' not in line]
    (bench / "dataset.jsonl").write_text("\n".join(without_math))
    out = tmp_path / "out"
    answers = ("--answers", str(sample / official["candidate"]), "--out", str(out))
    assert evaluate(parse("olmocr-bench", "--data", str(bench), *answers)) == 0
    scores = [record["score"] for record in records(out).values()]
    failed = [id for score in scores for id in score["failed"]]
    assert sorted(failed) == sorted(official["failed"])
    found = (out / "table.md").read_text()
    for name, (passed, total) in official["by_type"].items():
        assert f"| {name:13} | 0      | {total:<5} | {passed:<4} | rate of type " in found


def test_the_verdicts_on_equations_are_the_official_ones(tmp_path: Path) -> None:
    """The official scorer of commit f7cfe4c fails these two of the twelve."""
    sample = foreign(SAMPLE)
    try:
        Katex()
    except NoMath as reason:
        pytest.skip(str(reason))
    out = tmp_path / "out"
    answers = ("--answers", str(sample / "olmocr_pipeline"), "--out", str(out))
    data = str(sample / "dataset.jsonl")
    assert evaluate(parse("olmocr-bench", "--data", data, *answers)) == 0
    scores = [record["score"] for record in records(out).values()]
    failed = [id for score in scores for id, why in score["failed"].items() if "equation" in why]
    assert sorted(failed) == ["math_2503_04086_00", "mathfuncs_06"]
    assert (
        "| math          | 0      | 12    | 10   | rate of type " in (out / "table.md").read_text()
    )


def test_without_a_browser_math_is_skipped_and_counted(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    math = {"pdf": "a.pdf", "page": 1, "id": "m", "type": "math", "math": "x"}
    (bench / "math.jsonl").write_text(json.dumps(math))
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "a_pg1_repeat1.md").write_text("wanted $x$")
    monkeypatch.setenv("PATH", "")
    folder = tmp_path / "katex"
    folder.mkdir()
    (folder / "katex.min.js").touch()
    monkeypatch.setattr("services.commands.evaluation.olmocr.katex.KATEX_FOLDERS", (str(folder),))
    command = ("olmocr-bench", "--data", str(bench), "--answers", str(answers))
    assert evaluate(parse(*command, "--out", str(tmp_path / "out"))) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "1 math tests were skipped: there is no Chromium" in table
    assert "1 pages have no answer, and fail their tests" in table
    assert not any(line.startswith("| math") for line in table.splitlines())
    capsys.readouterr()
    wanted = ("--katex", str(folder), "--out", str(tmp_path / "out2"))
    assert evaluate(parse(*command, *wanted)) == 1
    assert "there is no Chromium" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"type": "other"}', "first.jsonl, line 1: "),
        (json.dumps(PRESENT | {"text": " "}), "first.jsonl, line 1: present.text: "),
        (json.dumps(PRESENT) + "\n" + json.dumps(PRESENT), "line 2: expected ids that differ"),
    ],
)
def test_a_wrong_test_is_named(
    bench: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (bench / "first.jsonl").write_text(line)
    command = ("olmocr-bench", "--data", str(bench), "--answers", str(bench))
    assert evaluate(parse(*command, "--out", str(tmp_path / "out"))) == 1
    assert message in capsys.readouterr().err


def test_a_pdf_with_a_baseline_test_gets_no_second(bench: Path) -> None:
    blank = {"pdf": "a.pdf", "page": 1, "id": "b", "type": "baseline", "max_length": 3}
    (bench / "blanks.jsonl").write_text(json.dumps(blank))
    checks = read_bench(bench).checks
    baselines = [(file, check.pdf) for file, check in checks if check.type == "baseline"]
    assert baselines == [("blanks.jsonl", "a.pdf"), ("baseline", "sub/broken.pdf")]


def test_hostile_pdfs_become_an_image_or_an_error() -> None:
    for name in ("hugemono.pdf", "enormous.pdf", "no_contents.pdf"):
        image = page_image(foreign("ocrmypdf") / name, 1, 1288)
        assert max(Image.open(io.BytesIO(image)).size) == 1288
    with pytest.raises(BadItem, match=r"invalid\.pdf, page 1: .*Data format error"):
        page_image(foreign("ocrmypdf") / "invalid.pdf", 1, 1288)


def test_a_page_or_file_that_is_not_there_is_an_error(bench: Path) -> None:
    with pytest.raises(BadItem, match="the file has only 1 pages"):
        page_image(bench / "pdfs" / "a.pdf", 2, 100)
    with pytest.raises(BadItem, match="FileNotFoundError"):
        page_image(bench / "pdfs" / "b.pdf", 1, 100)


def test_the_confidence_interval_is_that_of_a_mean_of_groups() -> None:
    assert confidence_interval([[1.0, 1.0], [0.0]]) == (0.5, 0.5)
    (low, high) = confidence_interval([[0.0, 1.0] * 50, [0.0, 1.0] * 50])
    deviation = (0.25 / 100 / 2) ** 0.5
    assert low == pytest.approx(0.5 - 1.96 * deviation, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * deviation, abs=0.01)
