"""Every setting says which values it takes, and every other value is refused by its flag."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from common.config import BadSetting, check_values, flag, plain_type
from common.settings import COMMANDS as PROGRAMS
from common.settings import SERVICES

COMMANDS = {**SERVICES, **PROGRAMS}
FILES_AND_LISTS = {
    "model",
    "read",
    "record",
    "image",
    "vision_buckets",
    "vision_artefact",
    "autoscale",
    "buckets",
    "embeddings",
    "lora",
    "lora_root",
    "out",
}
"""Texts that their own readers check."""


def settings_of(*kinds: type) -> list[tuple[str, str]]:
    """Return the command and the name of each setting whose values have one of these types."""
    return [
        (command, field.name)
        for command, settings in COMMANDS.items()
        for field in dataclasses.fields(settings)
        if kind_of(command, field.name) in kinds
    ]


def kind_of(command: str, name: str) -> type:
    return plain_type(typing.get_type_hints(COMMANDS[command])[name])


def metadata_of(command: str, name: str) -> Mapping[str, Any]:
    fields = dataclasses.fields(COMMANDS[command])
    return next(field.metadata for field in fields if field.name == name)


@pytest.mark.parametrize("command", COMMANDS)
def test_all_defaults_are_allowed(command: str) -> None:
    check_values(COMMANDS[command]())


@pytest.mark.parametrize(("command", "name"), settings_of(int, float))
def test_a_number_out_of_its_range_is_refused_by_its_flag(command: str, name: str) -> None:
    kind = kind_of(command, name)
    allowed = metadata_of(command, name)["range"]
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
    for command, name in settings_of(str):
        metadata = metadata_of(command, name)
        is_checked = metadata["choices"] or metadata["objection"]
        assert is_checked or name in FILES_AND_LISTS, f"{command}: {name}"


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
