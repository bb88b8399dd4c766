"""What an evaluation task is: items to ask about, and a score of the answers."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.commands.client import ClientError

ReadImage = Callable[[], bytes]
"""Reads the bytes of an image file. An item holds this, so images are in memory only when sent. It
may raise BadItem, which fails only its item."""
Part = str | ReadImage


class BadItem(ClientError):
    """One item cannot be asked about, for the reason in the message. The others can."""


@dataclass(frozen=True)
class Item:
    """One request of a task."""

    id: str
    parts: Sequence[Part]
    """The user's message: texts and images in their order."""
    target: Any = None
    """What the task's score compares the answer with."""
    repeat: int = 0
    """Counts the items that ask the same; it is added to the seed."""

    @property
    def text(self) -> str:
        """The message as one text, with `<image>` for each image."""
        return "".join(part if isinstance(part, str) else "<image>" for part in self.parts)


@dataclass(frozen=True)
class Answered:
    """An item and what the model said."""

    item: Item
    output: str
    """The answer; "" if the request failed."""
    failed: bool = False
    """Whether the item got no answer. It then counts as wrong."""
    seconds: float = 0.0
    """The time from sending the request to its end; 0 if nothing was asked."""


@dataclass(frozen=True)
class Row:
    """A line of the table of scores."""

    task: str
    total: int
    """The number of items."""
    passed: float
    """The items that are right; the sum of their scores if those are fractions."""
    metric: str
    value: float


@dataclass(frozen=True)
class Scores:
    """What a task makes of the answers."""

    rows: Sequence[Row]
    parts: Sequence[dict[str, Any]]
    """The scores of each item, in the order of the answers."""
    report: dict[str, Any] = field(default_factory=dict)
    """The scores in the form in which the benchmark itself prints them, if it has one."""
    notes: Sequence[str] = ()
    """Sentences that a reader of the table must know."""


def no_flags(parser: argparse.ArgumentParser) -> None:
    """Add no flags: the `add_arguments` of a task that has none of its own."""


@dataclass(frozen=True)
class Task:
    """A benchmark. `load` and `score` get all flags, those of the task included."""

    name: str
    help: str
    data: str
    """The forms that `--data` may have, for the help text."""
    prompt: Callable[[str], str]
    """Returns the template for a served model's name; `fill` replaces its fields."""
    load: Callable[[argparse.Namespace], Sequence[Item]]
    """Reads the data; `prompt` of the flags is the template. Raises BadData."""
    score: Callable[[Sequence[Answered], argparse.Namespace], Scores]
    max_tokens: int | None
    """The longest answer by default; None for what is left of the context."""
    add_arguments: Callable[[argparse.ArgumentParser], None] = no_flags
    asked_by: Sequence[str] = ()
    """The task's own flags that change what is asked, by their names among the arguments."""


def fill(template: str, **values: str) -> str:
    """Return a template with `{name}` replaced by the value of that name; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def mean(values: Sequence[float]) -> float:
    """Return the mean of the values, or 0 if there are none."""
    return sum(values) / len(values) if values else 0.0
