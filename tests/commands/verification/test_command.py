"""The command itself: what cannot be compared is neither right nor wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from common.checkpoint import BadCheckpoint, open_checkpoint
from common.process import EXIT_USAGE
from services.cli import make_parser, run
from services.commands.client import ClientError
from services.commands.output import json_line
from services.commands.verification import memory
from services.commands.verification import run as verification_run
from services.commands.verification.comparison import Comparison, Step
from services.commands.verification.families import REFERENCES
from services.commands.verification.questions import sample_images
from services.commands.verification.report import Finding, describe
from services.llm.shard import write_parts
from tests.golden import GoldenCase

CASE = GoldenCase("a_image")
NOWHERE = "http://127.0.0.1:9/v1"


def verify(*arguments: str) -> int:
    return run(make_parser().parse_args(["verify", "--url", NOWHERE, *arguments]))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--model", "none"), "no model directory none"),
        (("--model", str(CASE.checkpoint), "--image", __file__), "is not a PNG, JPEG"),
        (("--model", str(CASE.checkpoint), "--image", "none.png"), "cannot read none.png"),
        (("--model", str(CASE.checkpoint)), f"nothing answers at {NOWHERE}"),
    ],
)
def test_what_cannot_be_compared_has_a_status_of_its_own(
    arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(*arguments) == EXIT_USAGE
    assert reason in capsys.readouterr().err


def test_a_damaged_image_is_refused_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(sample_images()[0][:500])
    assert verify("--model", str(CASE.checkpoint), "--image", str(path)) == EXIT_USAGE
    assert f"{path} cannot be read as an image" in capsys.readouterr().err


def test_too_little_memory_is_refused_with_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    assert verify("--model", str(CASE.checkpoint), "--served-model-name", "tiny") == EXIT_USAGE
    shown = capsys.readouterr()
    assert "needs 1.0 GiB" in shown.out
    assert "run it on another host" in shown.err


def test_what_differs_is_said_even_if_a_later_question_is_not_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def findings(*_: object) -> Iterator[Finding]:
        yield Finding("text", "equal", None, "step 3: another token")
        raise ClientError("nothing answers")

    monkeypatch.setattr(verification_run, "load", lambda *_: SimpleNamespace(title="a reference"))
    monkeypatch.setattr(verification_run, "findings", findings)
    asked = ("--model", str(CASE.checkpoint), "--served-model-name", "tiny")
    assert verify(*asked) == EXIT_USAGE
    shown = capsys.readouterr()
    assert "text: step 3: another token" in shown.out and "nothing answers" in shown.err


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ImportError("no module transformers"), "pip install 'twinlens[reference]'"),
        (json.JSONDecodeError("no template", "", 0), "cannot be read by its reference: no templ"),
        (BadCheckpoint("it lacks a tensor"), "twinlens: it lacks a tensor"),
    ],
)
def test_a_reference_that_cannot_be_made_is_one_clear_line(
    failure: Exception,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def make(*_: object) -> NoReturn:
        raise failure

    monkeypatch.setitem(REFERENCES, "qwen2_5_vl", make)
    asked = ("--model", str(CASE.checkpoint), "--served-model-name", "tiny")
    assert verify(*asked) == EXIT_USAGE
    assert reason in capsys.readouterr().err


def test_limits_of_pixels_are_refused_for_a_family_that_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(GoldenCase("a_image", "wemm").checkpoint)
    asked = ("--model", model, "--served-model-name", "tiny", "--max-pixels", "50000")
    assert verify(*asked) == EXIT_USAGE
    assert "start the system without --min-pixels and --max-pixels" in capsys.readouterr().err


def test_cut_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "vlmo"
    write_parts(open_checkpoint(GoldenCase("vqa_base", "vlmo").checkpoint), 2, model)
    assert verify("--model", str(model)) == EXIT_USAGE
    assert "give the file that was cut" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_a_tolerance_is_a_positive_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verify("--model", str(CASE.checkpoint), "--tolerance", value)
    assert "is not a positive number" in capsys.readouterr().err


def test_a_step_is_told_with_both_tokens_and_their_margin() -> None:
    step = Step("token", 3, served=46, best=32, margin=1.93, difference=2.41)
    assert describe(step, {46: ".", 32: "\n"}.__getitem__) == (
        "step 3: another token; served 46 ('.'), the reference's best is 32 ('\\n'), ahead "
        "by 1.9; log-probabilities differ by up to 2.4"
    )


def test_a_finding_is_json_even_without_numbers() -> None:
    step = Step("token", 0, 1, 2, margin=0.5, difference=float("nan"))
    comparison = Comparison(1, float("inf"), float("nan"), 0.0, 0, step)
    fields = json.loads(json_line(Finding("text", "equal", comparison).fields()))
    assert fields["comparison"]["max_difference"] is None
    assert fields["comparison"]["first"]["difference"] is None
    assert fields["comparison"]["first"]["margin"] == 0.5
