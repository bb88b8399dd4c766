"""The services that are fuzzed: their real work loops, with fakes for what computes.

A target plays actions, can be asked an innocent question, and says what it holds.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any

from common.events import Event
from common.messages import PROTOCOL_VERSION, Hello, Peer, RequestKey
from tests.fuzz.actions import Action, Call, Leave, Member, Say, Wait, Work, compose
from tests.fuzz.clock import CLOCK
from tests.fuzz.door import Door
from tests.fuzz.making import Maker

FAR = 3e9
"""Seconds until every deadline that a message may set has passed."""
ATTEMPTS = (0, 0, 1)
ITEMS = (0, 0, 1, 2)
INNOCENT_ID = "innocent"
REQUEST_IDS = ("a", "b", "c", INNOCENT_ID)
ADDRESS = "ipc:///nowhere"
TRACEPARENT = f"00-{'5' * 32}-{'6' * 16}-01"


def innocent_key(number: int) -> RequestKey:
    """Return the name of an innocent request, which comes once."""
    return INNOCENT_ID, 1000 + number


class Target(ABC):
    """A service with its peers."""

    role: str
    name = ""
    """What the target is called, if not by its role."""
    peers: tuple[Member, ...]
    """The peers whose messages are random."""
    innocents: tuple[Member, ...] = ()
    """The peers that never leave and send valid messages only."""

    def __init__(self) -> None:
        self.door = Door(self.role)

    def pools(self, number: int) -> dict[str, Sequence[Any]]:
        """Return the likely values of fields, by name, in the round of this number.

        They name the innocent requests of the round, too.
        """
        ids = tuple(peer.id for peer in (*self.peers, *self.innocents))
        return {
            "request_id": REQUEST_IDS,
            "attempt": (*ATTEMPTS, innocent_key(2 * number)[1]),
            "item": ITEMS,
            "id": ids,
            "gateway_id": ids,
            "preprocess_id": ids,
            "avoid": ids,
            "role": tuple({peer.role for peer in self.peers}),
            "address": (ADDRESS,),
            "llm": tuple(Peer(each, ADDRESS) for each in ids),
            "detokenizer": tuple(Peer(each, ADDRESS) for each in ids),
            "protocol_version": (PROTOCOL_VERSION,),
            "fingerprint": ("", "f" * 64),
            "traceparent": ("", TRACEPARENT),
        }

    @abstractmethod
    def play(self, events: list[Event[Any]]) -> None:
        """Let the work loop handle events, and work until it would wait."""

    @abstractmethod
    def converse(self, maker: Maker) -> Sequence[Action]:
        """Return the messages about one random request, in a valid order."""

    @abstractmethod
    def question(self, number: int) -> Sequence[Action]:
        """Return the messages of an innocent request."""

    @abstractmethod
    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        """Return what was answered to the innocent request, in a form that can be compared."""

    @abstractmethod
    def held(self) -> dict[str, float]:
        """Return what the service holds, by name."""

    @classmethod
    @functools.cache
    def expected(cls) -> Any:
        """Return the answer to an innocent request at a service that nothing disturbed."""
        with closing(cls()) as target:
            return target.ask(0)

    def compose(self, maker: Maker, size: int) -> list[Action]:
        """Return about `size` random actions."""
        return compose(maker, self.peers, self.role, size, self.converse)

    # Playing

    def perform(self, actions: Iterable[Action]) -> None:
        """Let the actions happen to the service."""
        for action in actions:
            match action:
                case Say():
                    self._say(self.address(action))
                case Leave(peer=peer):
                    self.door.leave(peer.id)
                case Wait(seconds=seconds):
                    CLOCK.ahead += seconds
                case Call(name=name, arguments=arguments):
                    getattr(self, name)(*arguments)
                case Work():
                    self.play(self.door.take_events())
        self.play(self.door.take_events())

    def address(self, say: Say) -> Say:
        """Return what is said, with ids that only the running service knows."""
        return say

    def _say(self, say: Say) -> None:
        if say.peer.id not in self.door and not isinstance(say.message, Hello):
            self.door.join(say.peer.id, say.peer.role)
        self.door.say(say.peer.id, say.message)

    def close(self) -> None:
        """Free what the target itself holds."""
        self.door.leave_all()

    def settle(self, leaves: bool) -> None:
        """Let every peer but the innocent ones leave, or every deadline pass."""
        if leaves:
            self.door.leave_all(but=tuple(peer.id for peer in self.innocents))
            self.play(self.door.take_events())
        else:
            CLOCK.ahead += FAR
            self.play([])
            self.play([])
        self.finish()

    def finish(self) -> None:
        """Let the service finish what it does by itself."""
        self.play([])

    def ask(self, number: int) -> Any:
        """Ask an innocent request, and return the answer."""
        self.door.sent.clear()
        self.perform(self.question(number))
        self.finish()
        return self.answer(number, self.door.sent)
