"""Rounds of random actions against one target, and what must hold after each of them."""

import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import structlog

from common.wire import Tensor
from tests.fuzz.actions import Action, Call, Say
from tests.fuzz.clock import CLOCK
from tests.fuzz.making import Maker
from tests.fuzz.targets import Target

ROUND_ACTIONS = 400
ROUNDS_PER_TARGET = 6
"""How many rounds one work loop lives. In the last one, all deadlines pass."""
MAX_FAULTS = 5
MAX_REPLAYS = 400
MAX_SHOWN_BYTES = 60


@dataclass
class Result:
    """What a run against one target has done and found."""

    counts: Counter[str] = field(default_factory=Counter)
    """The messages by their types, or the bodies by their answers."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    unforeseen: Counter[str] = field(default_factory=Counter)
    """Exceptions that only the guard of a work loop caught, by where they were raised."""

    def add(self, other: "Result") -> None:
        """Add what another run has done and found."""
        self.counts += other.counts
        self.seconds += other.seconds
        self.faults += other.faults
        self.unforeseen += other.unforeseen


class Fault(Exception):
    """Something that must hold does not."""


class Rounds:
    """Runs rounds against targets that `make` makes."""

    def __init__(self, make: Callable[[], Target], seed: str) -> None:
        self._make = make
        self._seed = seed
        self.result = Result()

    def run(self, num_messages: int) -> Result:
        """Run rounds until this number of messages was sent."""
        began = time.perf_counter()
        number = 0
        while not self._has_sent(num_messages) and len(self.result.faults) < MAX_FAULTS:
            with CLOCK.stopped(), closing(self._make()) as target:
                while self._run_round(target, number):
                    if is_last(number) or self._has_sent(num_messages):
                        break
                    number += 1
            number += 1
        self.result.seconds = time.perf_counter() - began
        return self.result

    def _has_sent(self, num_messages: int) -> bool:
        return self.result.counts.total() >= num_messages

    def _run_round(self, target: Target, number: int) -> bool:
        """Return whether the target survived a round."""
        actions = self.actions_of(target, number)
        self._count(actions)
        try:
            play_round(target, actions, number)
        except Exception as e:  # noqa: BLE001 - whatever ends a work loop is a fault
            self.result.faults.append(self._report(number, actions, e))
            return False
        return True

    def actions_of(self, target: Target, number: int) -> list[Action]:
        """Return the actions of a round, which depend on its number and the seed only."""
        maker = Maker(
            Random(f"{self._seed} {target.name or target.role} {number}"), target.pools(number)
        )
        actions = target.compose(maker, ROUND_ACTIONS)
        if is_last(number) or not target.innocents:
            return actions
        return merged(maker.draw, actions, target.question(2 * number))

    def _count(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Say(message=message):
                    self.result.counts[type(message).__name__] += 1
                case Call(message=str(name)) if name:
                    self.result.counts[name] += 1

    def _report(self, number: int, actions: list[Action], error: Exception) -> str:
        """Return what failed, and the fewest actions that were found to do it."""
        found = shortest(
            actions,
            lambda some: self._fails(number, some),
            is_needed,
        )
        lines = [f"round {number}: {describe(error)}"]
        if not found:
            lines.append("this round alone does not fail; it takes those before it, too")
        return "\n    ".join([*lines, *map(show, found)])

    def _fails(self, number: int, actions: list[Action]) -> bool:
        with CLOCK.stopped(), closing(self._make()) as target:
            try:
                play_round(target, actions, number)
            except Exception:  # noqa: BLE001 - as in a round
                return True
        return False


def play_round(target: Target, actions: list[Action], number: int) -> None:
    """Play one round; raise an error if the service fails, or holds something afterwards.

    In most rounds the peers leave, and an innocent request among them is answered nevertheless. In
    the last one of a target all deadlines pass.
    """
    expected = target.expected()
    target.door.sent.clear()
    descriptors = num_descriptors()
    target.perform(actions)
    target.settle(leaves=not is_last(number))
    if target.innocents and not is_last(number):
        check_equal(
            "the answer to the innocent among them",
            target.answer(2 * number, target.door.sent),
            expected,
        )
    target.settle(leaves=True)
    held = {name: count for name, count in target.held().items() if count}
    if held:
        raise Fault(f"still held: {held}")
    if (now := num_descriptors()) > descriptors:
        raise Fault(f"{now} descriptors, {descriptors} before")
    check_equal("the answer to an innocent", target.ask(2 * number + 1), expected)


def is_last(number: int) -> bool:
    """Whether this is the last round of a target."""
    return (number + 1) % ROUNDS_PER_TARGET == 0


def check_equal(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Fault(f"{name} is {found!r:.600}, expected {expected!r:.600}")


def merged(draw: Random, actions: list[Action], question: Sequence[Action]) -> list[Action]:
    """Return both lists as one, each in its order.

    The question comes first: a request belongs to the peer that brought it.
    """
    places = [0, *sorted(draw.randrange(len(actions) + 1) for _ in question[1:])]
    found = list(actions)
    for place, action in reversed(list(zip(places, question, strict=True))):
        found.insert(place, action)
    return found


def shortest(
    actions: list[Action],
    fails: Callable[[list[Action]], bool],
    is_needed: Callable[[Action], bool],
) -> list[Action]:
    """Return few of the actions that still fail; none if they do not fail on their own.

    Those that are needed, because an answer to them is expected, stay.
    """
    if not fails(actions):
        return []
    replays = 0
    size = len(actions) // 2
    while size and replays < MAX_REPLAYS:
        place = 0
        while place < len(actions) and replays < MAX_REPLAYS:
            end = place + size
            needed = [action for action in actions[place:end] if is_needed(action)]
            fewer = actions[:place] + needed + actions[end:]
            replays += 1
            if len(fewer) < len(actions) and fails(fewer):
                actions = fewer
            else:
                place = end
        size //= 2
    return actions


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_needed(action: Action) -> bool:
    """Whether the action may belong to an innocent request."""
    return isinstance(action, Call) or (isinstance(action, Say) and action.peer.is_trusted)


def show(action: Action) -> str:
    """Return an action as text, with the beginnings of the tensors."""
    if not isinstance(action, Say):
        return f"{action!r:.1000}"
    return f"{action.peer.id} says {action.message!r:.1000}" + "".join(
        f"\n        {name}: {bytes(value.data[:MAX_SHOWN_BYTES])!r}"
        for name, value in contents(action.message)
    )


def contents(message: Any) -> Iterator[tuple[str, Tensor]]:
    for name in message.__struct_fields__:
        if isinstance(value := getattr(message, name), Tensor):
            yield name, value


def describe(error: BaseException) -> str:
    """Return an error with the place that it was raised at."""
    if isinstance(error, Fault):
        return str(error)
    *_, place = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error!s:.200} ({where(place)})"


def where(place: traceback.FrameSummary) -> str:
    return f"{Path(place.filename).name}:{place.lineno} in {place.name}"


class Unforeseen:
    """A processor of structlog. It counts the exceptions that are logged, and writes nothing."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, _logger: Any, _method: str, event: Any) -> Any:
        error = event.get("exc_info")
        error = sys.exc_info()[1] if error is True else error
        if isinstance(error, BaseException):
            self.counts[describe(error)] += 1
        raise structlog.DropEvent


@contextmanager
def quiet() -> Iterator[Unforeseen]:
    """Write no log, and count the exceptions in it."""
    before = structlog.get_config()
    log = Unforeseen()
    structlog.configure(
        processors=[log],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        cache_logger_on_first_use=False,
    )
    try:
        yield log
    finally:
        structlog.configure(**before)
