"""Settings as frozen dataclasses: each field is a flag and a TWINLENS_* variable."""

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from common.errors import shorten

PREFIX = "TWINLENS_"
T = TypeVar("T")


class BadSetting(ValueError):
    """A flag or variable is unknown or has an invalid value. The message names it."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have."""

    least: float
    most: float

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most  # NaN is in no range

    def __str__(self) -> str:
        return f"from {self.least:.15g} to {self.most:.15g}"


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    hidden: bool = False,
    range: Range | None = None,
    objection: Callable[[str], str] | None = None,
    repeats: bool = False,
) -> Any:
    """Return a field of a settings dataclass. It is typed Any, as `dataclasses.field` is.

    Parameters
    ----------
    default, help, choices
        are those of its flag.
    hidden
        whether `--help` leaves it out.
    range
        has the values that a number may have.
    objection
        returns what is wrong with a text, in words; empty if nothing is.
    repeats
        whether the flag may be repeated. Its values are joined by commas.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "hidden": hidden,
            "range": range,
            "objection": objection,
            "repeats": repeats,
        },
    )


def names_of(settings: type) -> set[str]:
    """Return the names of all fields of a settings dataclass."""
    return {field.name for field in dataclasses.fields(settings)}


def load(
    settings: type[T], parser: argparse.ArgumentParser, argv: list[str] | None, known: Iterable[str]
) -> T:
    """Return the settings: flags win over environment variables, and those over defaults.

    If a value is invalid, print the reason and exit with status 2. `known` has the names of the
    settings of all commands.
    """
    add_arguments(settings, parser)
    try:
        set_environment_defaults(parser, os.environ, known)
        loaded = from_namespace(settings, parser.parse_args(argv))
        check_values(loaded)
    except BadSetting as e:
        parser.error(str(e))
    return loaded


def check_values(settings: Any) -> None:
    """Check each value of a settings dataclass against what its field says.

    Raises
    ------
    BadSetting
        if a number is out of its range, or there is an objection to a text.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        allowed = field.metadata["range"]
        object_to = field.metadata["objection"]
        reason = object_to(value) if object_to else ""
        if allowed and value not in allowed:
            reason = f"must be {allowed}"
        if reason:
            raise BadSetting(f"{flag(field.name)} {shorten(str(value))}: {reason}")


def from_namespace(settings: type[T], namespace: argparse.Namespace) -> T:
    return settings(**{name: getattr(namespace, name) for name in names_of(settings)})


def add_arguments(settings: type, parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind = plain_type(hints[field.name])
        meta = field.metadata
        text = (
            argparse.SUPPRESS
            if meta["hidden"]
            else f"{meta['help']} [{PREFIX}{field.name.upper()}]"
        )
        if field.default not in (None, "", False) and not meta["hidden"]:
            text += f" (default {field.default})"
        how: dict[str, Any] = {"type": kind, "choices": meta["choices"] or None}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if meta["repeats"]:
            how["action"] = Joined
        parser.add_argument(
            flag(field.name),
            dest=field.name,
            default=field.default,
            help=text.replace("%", "%%"),
            **how,
        )


class Joined(argparse.Action):
    """Joins the values of a repeated flag by commas. They replace those of the environment."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = getattr(namespace, self.dest)
        joined = values if given == self.default else f"{given},{values}"
        setattr(namespace, self.dest, joined)


def flag(name: str) -> str:
    """Return the flag of a field, such as `--max-model-len` of `max_model_len`."""
    return "--" + name.replace("_", "-")


def arguments_of(values: Mapping[str, Any]) -> list[str]:
    """Return settings as the command-line arguments of another process. None sets nothing."""
    return [argument(name, value) for name, value in values.items() if value is not None]


def argument(name: str, value: object) -> str:
    """Return a setting as a command-line argument."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)}={value}"


def plain_type(hint: Any) -> type:
    """Return the type of a field's values, which is `int` for `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def set_environment_defaults(
    parser: argparse.ArgumentParser, environ: Mapping[str, str], known: Iterable[str]
) -> None:
    """Make the parser's own TWINLENS_* variables its defaults, and ignore those of other commands.

    Raises
    ------
    BadSetting
        if no command knows a variable, or its value is invalid.
    """
    given = {
        key.removeprefix(PREFIX).lower(): value
        for key, value in environ.items()
        if key.startswith(PREFIX)
    }
    actions = {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    }
    for name, value in given.items():
        if name in actions:
            parser.set_defaults(**{name: convert(actions[name], name, value)})
        elif name not in set(known):
            raise BadSetting(
                f"no service or command knows {PREFIX}{name.upper()}: see --help for the names"
            )


def convert(action: argparse.Action, name: str, value: str) -> Any:
    """Return an environment variable's value, converted as the flag would convert it."""
    variable = PREFIX + name.upper()
    if isinstance(action, argparse.BooleanOptionalAction):
        if value.lower() not in ("1", "true", "0", "false"):
            raise BadSetting(f"{variable}={value!r}: give 1 or 0")
        return value.lower() in ("1", "true")
    if value == "" and action.default is None:
        return None
    try:
        converted = action.type(value) if callable(action.type) else value
    except ValueError as e:
        raise BadSetting(
            f"{variable}={value!r} is not a valid {getattr(action.type, '__name__', 'value')}"
        ) from e
    if action.choices and converted not in action.choices:
        raise BadSetting(f"{variable}={value!r}: choose from {', '.join(map(str, action.choices))}")
    return converted
