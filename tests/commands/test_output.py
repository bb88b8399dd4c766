"""Nothing that a member or a model says is obeyed by the terminal of the person who asks."""

import json
import math
import sys

import pytest

from common.membership import READY, state_name
from proto.twinlens.control.v1 import control_pb2
from services.commands.client import ClientError, run_command
from services.commands.control import describe, table
from services.commands.output import answer_text, json_line, one_line

CLEAR = "\x1b[2J"
CSI = "\x9b2J"


def test_a_members_detail_cannot_draw_on_the_terminal() -> None:
    member = control_pb2.Member(id=f"v-1{CSI}", role="vision", state=READY, detail=f"{CLEAR}\nok")
    shown = table([describe(member)])
    assert len(shown.splitlines()) == 2
    assert r"v-1\u009b2J" in shown and r"\u001b[2J\u000aok" in shown
    assert not any(character in shown for character in "\x1b\x9b")


def test_json_stays_the_same_value_without_control_characters() -> None:
    value = {"detail": f"{CLEAR}{CSI}\u202e é"}
    line = json_line(value)
    assert json.loads(line) == value
    assert line.isprintable() and "é" in line


def test_numbers_that_json_cannot_write_are_null() -> None:
    value = {"a": [1.5, math.nan], "b": (math.inf,), "c": {"d": -math.inf}, "e": "NaN"}
    expected = {"a": [1.5, None], "b": [None], "c": {"d": None}, "e": "NaN"}
    assert json.loads(json_line(value)) == expected


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_answer_is_escaped_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    text = f"one\ttwo\n{CLEAR}é"
    assert answer_text(text) == ("one\ttwo\n\\u001b[2Jé" if is_terminal else text)


def test_an_error_of_the_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise ClientError(f"it says{CLEAR}\nno")

    assert run_command(fail, None) == 1  # type: ignore[arg-type]
    assert capsys.readouterr().err == "twinlens: it says\\u001b[2J\\u000ano\n"


def test_a_state_of_another_version_is_shown() -> None:
    assert state_name(99) == "state 99"  # type: ignore[arg-type]
    assert one_line("plain é") == "plain é"
