"""Flags win over variables and those over defaults, and every error names what was set wrongly."""

import argparse
from dataclasses import dataclass
from typing import Any

import pytest

from common.config import (
    BadSetting,
    add_arguments,
    from_namespace,
    load,
    names_of,
    set_environment_defaults,
    setting,
)
from common.settings import KNOWN_NAMES, SERVICES


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    cook: str = setting("Ann", "who cooks")
    num_pots: int = setting(3, "pots, 100% clean")
    heat: float = setting(0.5, "how hot")
    is_open: bool = setting(False, "whether guests may come")
    seats: int | None = setting(None, "seats (default: as many as come)")
    style: str = setting("auto", "style", choices=("auto", "plain"))
    secret: int = setting(0, "not for people", hidden=True)


OTHERS = {"gas_bill"}


def parsed(*argv: str) -> Kitchen:
    return load(Kitchen, argparse.ArgumentParser("kitchen", allow_abbrev=False), list(argv), OTHERS)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return what a user reads on stderr."""
    with pytest.raises(SystemExit) as exit:
        parsed(*argv)
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err


def test_defaults_hold_if_nothing_is_set() -> None:
    assert parsed() == Kitchen()


def test_a_variable_beats_the_default_and_a_flag_beats_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TWINLENS_COOK", "Bob")
    monkeypatch.setenv("TWINLENS_NUM_POTS", "7")
    assert parsed("--num-pots", "9") == Kitchen(cook="Bob", num_pots=9)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("NUM_POTS", "0", 0),
        ("HEAT", "2", 2.0),
        ("IS_OPEN", "1", True),
        ("IS_OPEN", "True", True),
        ("IS_OPEN", "0", False),
        ("IS_OPEN", "false", False),
        ("SEATS", "12", 12),
        ("SEATS", "", None),
        ("STYLE", "plain", "plain"),
        ("COOK", "", ""),
        ("SECRET", "5", 5),
    ],
)
def test_a_variable_is_read_as_its_flag_would_be(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: Any
) -> None:
    monkeypatch.setenv(f"TWINLENS_{name}", text)
    assert parsed() == Kitchen(**{name.lower(): value})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NUM_POTS", "many"),
        ("NUM_POTS", ""),
        ("NUM_POTS", "1.5"),
        ("HEAT", "hot"),
        ("IS_OPEN", "perhaps"),
        ("SEATS", "x"),
        ("STYLE", "loud"),
    ],
)
def test_an_invalid_variable_is_named_with_its_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    monkeypatch.setenv(f"TWINLENS_{name}", text)
    assert f"TWINLENS_{name}={text!r}" in refused(capsys)


@pytest.mark.parametrize("name", ["POTS", "NUM_POT", "HELP", ""])
def test_a_variable_that_no_command_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(f"TWINLENS_{name}", "1")
    assert f"no service or command knows TWINLENS_{name}:" in refused(capsys)


def test_variables_of_other_commands_and_programs_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TWINLENS_GAS_BILL", "not a number")
    monkeypatch.setenv("KITCHEN_COOK", "Bob")
    assert parsed() == Kitchen()


@pytest.mark.parametrize(
    "argv",
    [
        ["--num-pots", "many"],
        ["--style", "loud"],
        ["--nothing"],
        ["--num", "3"],
        ["extra"],
        ["--num-pots"],
    ],
    ids=" ".join,
)
def test_an_invalid_flag_exits_with_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert argv[0] in refused(capsys, *argv)


def test_a_bool_is_a_flag_and_its_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed("--is-open").is_open
    monkeypatch.setenv("TWINLENS_IS_OPEN", "1")
    assert not parsed("--no-is-open").is_open


def test_help_shows_every_flag_with_its_variable_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert "--num-pots NUM_POTS pots, 100% clean [TWINLENS_NUM_POTS] (default 3)" in said
    assert "seats (default: as many as come) [TWINLENS_SEATS]" in said
    assert "secret" not in said.lower()


@pytest.mark.parametrize("role", SERVICES)
def test_a_service_refuses_no_variable_of_another_command(role: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(SERVICES[role], parser)
    others = KNOWN_NAMES - names_of(SERVICES[role])
    set_environment_defaults(
        parser, {f"TWINLENS_{name.upper()}": "x" for name in others}, KNOWN_NAMES
    )
    assert from_namespace(SERVICES[role], parser.parse_args([])) == SERVICES[role]()
    with pytest.raises(BadSetting, match="TWINLENS_NONSENSE"):
        set_environment_defaults(parser, {"TWINLENS_NONSENSE": "x"}, KNOWN_NAMES)
