"""Every setting says which values it takes, and every other value is refused by its flag."""

import dataclasses
import math
import typing
from dataclasses import replace
from typing import Any

import pytest

from common.config import BadSetting, check_values, flag, plain_type
from common.settings import SERVICES, PlanSettings, ServeSettings

COMMANDS = {**SERVICES, "serve": ServeSettings, "plan": PlanSettings}
FILES_AND_LISTS = {"model", "read", "image", "vision_buckets", "autoscale"}
"""Texts that their own readers check."""


def fields() -> list[tuple[str, str, type, Any]]:
    """Return the command, the name, the type and the metadata of each setting."""
    return [
        (command, field.name, plain_type(typing.get_type_hints(settings)[field.name]), field)
        for command, settings in COMMANDS.items()
        for field in dataclasses.fields(settings)
    ]


NUMBERS = [(c, name, kind, f) for c, name, kind, f in fields() if kind in (int, float)]


@pytest.mark.parametrize("command", COMMANDS)
def test_all_defaults_are_allowed(command: str) -> None:
    check_values(COMMANDS[command]())


@pytest.mark.parametrize(("command", "name", "kind", "field"), NUMBERS, ids=str)
def test_a_number_out_of_its_range_is_refused_by_its_flag(
    command: str, name: str, kind: type, field: Any
) -> None:
    allowed = field.metadata["range"]
    assert allowed is not None, "give the setting a range"
    for edge in (allowed.least, allowed.most):
        check_values(replace(COMMANDS[command](), **{name: kind(edge)}))
    wrong = [-1, allowed.least - 1, allowed.most + 1, 10**30]
    if kind is float:
        wrong += [math.nan, math.inf, -math.inf]
    for value in wrong:
        with pytest.raises(BadSetting, match=f"^{flag(name)} .* must be from "):
            check_values(replace(COMMANDS[command](), **{name: kind(value)}))


def test_every_text_has_choices_or_a_check() -> None:
    unchecked = {
        name
        for _, name, kind, field in fields()
        if kind is str and not field.metadata["choices"] and not field.metadata["objection"]
    }
    assert unchecked == FILES_AND_LISTS


@pytest.mark.parametrize("name", ["listen", "controller"])
@pytest.mark.parametrize("scheme", ["ipc://", "unix:", "unix://"])
def test_a_socket_whose_path_is_too_long_is_refused_by_its_flag(name: str, scheme: str) -> None:
    """Others would wait for ever for a member that nobody can connect to."""
    fitting = replace(SERVICES["llm"](), **{name: f"{scheme}/{'x' * 106}"})
    check_values(fitting)
    with pytest.raises(BadSetting, match=f"^{flag(name)} .* at most 107 bytes, .* has 108"):
        check_values(replace(SERVICES["llm"](), **{name: f"{scheme}/{'x' * 107}"}))


@pytest.mark.parametrize("value", ["a\nb", "\x1b[2J", "x" * 1000, "a/../b", "\udcff"])
def test_a_name_that_others_could_not_read_is_refused(value: str) -> None:
    with pytest.raises(BadSetting, match=r"^--name ") as caught:
        check_values(replace(SERVICES["vision"](), name=value))
    assert len(str(caught.value)) < 500
