"""Stand-ins for a process's connections: links that record messages, and a scripted member."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from common.events import Event, Received
from common.member import Posted
from common.messages import Abort, Peer
from common.progress import Progress
from common.tracing import NO_TRACING, Tracing

T = TypeVar("T")


class FakeLinks:
    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.connected: list[tuple[Peer, str]] = []

    def connect(self, peer: Peer, role: str) -> None:
        self.connected.append((peer, role))

    def send(self, peer_id: str, message: Any) -> None:
        self.sent.append((peer_id, message))

    def to(self, peer_id: str) -> list[Any]:
        return [message for receiver, message in self.sent if receiver == peer_id]

    def of(self, kind: type[T]) -> list[T]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    def take(self) -> list[tuple[str, Any]]:
        """Return the messages sent since the last call, with their receivers."""
        sent = self.sent
        self.sent = []
        return sent


class FakeMember:
    """Returns one batch of events each time a work loop asks for events.

    After the last batch, a loop that waits for events ends. A batch may be a function: it is called
    when its turn comes, and can look at the messages sent so far.
    """

    id = "me"

    def __init__(self) -> None:
        self.id = "fake-1"
        self.links = FakeLinks()
        self.progress = Progress()
        self.tracing: Tracing = NO_TRACING
        self.missing: list[str] | None = None
        self._script: Iterator[Any] = iter(())
        self._posted: list[Any] = []

    def play(self, worker: Any, *batches: list[Event] | Callable[[], list[Event]]) -> None:
        """Run the worker over the batches, and on until it would wait for more events."""
        self._script = iter(batches)
        worker.run()

    def take_events(self, wait: bool, timeout: float | None = None) -> list[Any] | None:
        """Return what was posted, and the next batch behind it."""
        posted = self._posted
        self._posted = []
        batch = next(self._script, None if wait and not posted else [])
        events = batch() if callable(batch) else batch
        return None if events is None else posted + events

    def post(self, event: object) -> None:
        self._posted.append(Posted(event))

    def events(self) -> Iterator[Event]:
        return itertools.chain.from_iterable(self._script)

    def track_load(self, load: Callable[[], tuple[int, int]]) -> None:
        self.load = load

    def set_missing_roles(self, roles: list[str]) -> None:
        self.missing = roles


def received(peer_id: str, role: str, *messages: Any) -> list[Event]:
    return [Received(peer_id, role, message) for message in messages]


def aborts(sent: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Return the receiver and the request id of each Abort."""
    return [
        (receiver, message.request_id) for receiver, message in sent if isinstance(message, Abort)
    ]
