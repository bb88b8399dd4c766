"""What happens to a service in one round: its peers come, go, and send messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

from common.messages import HOPS, Beat, Draining, Goodbye, Hello, Message
from tests.fuzz.making import Maker

WEIGHTS = {"goes on": 54, "random": 35, "repeated": 8, "waits": 2, "leaves": 1}
"""What may happen next."""
MAX_CONVERSATIONS = 5
HOLDER = "holder"
"""The id of whichever member of a role holds the request that a message is about."""
MUTATED_SHARE = 0.6
"""How many of the conversations have a message that was changed."""
WORK_SHARE = 0.25
"""How often the service gets to work between two actions."""


@dataclass(frozen=True)
class Member:
    """A peer of the service that is tested."""

    id: str
    role: str

    @property
    def is_trusted(self) -> bool:
        """Whether it sends only what belongs to an innocent request."""
        return self.id == HOLDER or self.id.endswith("-i")


@dataclass(frozen=True)
class Say:
    """A peer sends a message."""

    peer: Member
    message: Message


@dataclass(frozen=True)
class Leave:
    """A peer dies, and comes back when it has something to say."""

    peer: Member


@dataclass(frozen=True)
class Wait:
    """Time passes."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """The service handles what has arrived."""


@dataclass(frozen=True)
class Call:
    """A method of the target is called, for what only its service can do."""

    name: str
    arguments: tuple[Any, ...] = ()
    message: str = ""
    """The type of the message that this is, if it is one."""


Action = Say | Leave | Wait | Work | Call
Conversation = list[Say]


def compose(
    maker: Maker,
    peers: Sequence[Member],
    role: str,
    size: int,
    converse: Callable[[Maker], Sequence[Action]],
) -> list[Action]:
    """Return about `size` actions of peers of the service with this role.

    Conversations of valid messages run at the same time. Some have one message that was changed.
    Between them come random messages, repetitions by the same peer or another one, and deaths.
    """
    draw = maker.draw
    running: list[list[Action]] = []
    found: list[Action] = []
    said: list[Say] = []
    while len(found) < size:
        match draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]:
            case "leaves":
                found.append(Leave(draw.choice(peers)))
            case "waits":
                found.append(Wait(draw.choice([0.01, 1.0, 2.5])))
            case "random":
                peer = draw.choice(peers)
                found.append(Say(peer, maker.make(draw.choice(kinds_from(peer.role, role)))))
            case "repeated" if said:
                found.append(repeated(draw, draw.choice(said[-20:]), peers))
            case _:
                while len(running) < MAX_CONVERSATIONS:
                    running.append(changed(maker, converse(maker)))
                conversation = draw.choice(running)
                found += conversation[:1]
                del conversation[:1]
                running = [each for each in running if each]
        if found and isinstance(found[-1], Say):
            said.append(found[-1])
        if draw.random() < WORK_SHARE:
            found.append(Work())
    return found


def changed(maker: Maker, conversation: Sequence[Action]) -> list[Action]:
    """Return the conversation, in many cases with one message changed or left out."""
    found = list(conversation)
    place = maker.draw.randrange(len(found))
    say = found[place]
    if maker.draw.random() < MUTATED_SHARE and isinstance(say, Say):
        other = Say(say.peer, maker.mutate(say.message))
        found[place : place + 1] = [other] if maker.draw.random() < 0.9 else []
    return found


def repeated(draw: Random, say: Say, peers: Sequence[Member]) -> Say:
    """Return what was said before, by the same peer or by another one of its role."""
    twins = [peer for peer in peers if peer.role == say.peer.role]
    return Say(draw.choice(twins), say.message)


def kinds_from(sender: str, receiver: str) -> tuple[type[Any], ...]:
    """Return the messages that a role may send to another one.

    Those of the connection itself end it in many cases, so each is less likely than any other.
    """
    kinds = get_args(HOPS[sender, receiver])
    own = tuple(kind for kind in kinds if kind not in (Hello, Goodbye, Beat, Draining))
    return own * 20 + kinds
