"""Which preprocess may send an item next. This file knows no socket."""

import time
from collections import OrderedDict
from collections.abc import Callable

from common.messages import MIN_PRIORITY

MAX_GRANTED = 2
"""One item is in the tower while the pixels of the next one arrive.

More would only hold memory, and keep items from other replicas.
"""
ANSWER_SECONDS = 2.0
"""The time for pixels to follow their grant, or for an offer to follow a vacancy.

After that the room goes to the next peer.
"""


FIRST = MIN_PRIORITY - 1
"""Before every priority."""


class Room:
    """One budget of items for all producers.

    A peer that finds no room joins a queue. When room becomes free, it is reserved for the first
    peer in the queue for a moment. So no peer has to poll, and none is passed over but by peers
    with more urgent items.

        offer --room--> granted --------> tower --> done: room
          |                ^                          |
          no room          | offer                    v
          +--> in the queue --------vacancy------ invited --decline, or silence--> the next one

    An item that is apart gets the replica to itself. Until its end nobody else is admitted, nor
    until its owner has answered a vacancy afterwards: then the owner knows that the replica has
    survived the item, whatever the next one does to it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.size = 1
        """The items granted at once.

        It is 1 until one was measured, because nobody knows how long a second would wait.
        """
        self._queue: OrderedDict[str, int] = OrderedDict()
        """The peers that wait, each with the priority of its most urgent item that was refused."""
        self._invited: dict[str, float] = {}
        self._sole_peer = ""
        """The peer whose item has the replica to itself, or waits for that."""

    def admits(self, peer_id: str, num_granted: int, apart: bool = False) -> bool:
        """Whether the peer may have another item while `num_granted` are granted in total.

        This answers the peer's invitation, if it has one. If `apart`, the item must be the only
        one. If it cannot be yet, the replica takes no other item until it can.
        """
        self._invited.pop(peer_id, None)
        num_taken = num_granted + len(self._invited)
        if apart:
            self._sole_peer = self._sole_peer or peer_id
            return num_taken == 0 and self._sole_peer == peer_id
        if self._sole_peer:
            if num_taken or self._sole_peer != peer_id:
                return False
            self._sole_peer = ""
        return num_taken < self.size

    def num_free(self, num_granted: int) -> int:
        """Return how many further items would be admitted now: the credits of the replica."""
        num_taken = num_granted + len(self._invited)
        return 0 if self._sole_peer else max(0, self.size - num_taken)

    @property
    def is_exclusive(self) -> bool:
        """Whether an item has the replica to itself, or waits for that."""
        return bool(self._sole_peer)

    def enqueue(self, peer_id: str, priority: int = 0) -> None:
        """Let the peer wait for room. A peer that waits already keeps its place.

        Peers with lower values are invited first.
        """
        self._queue[peer_id] = min(priority, self._queue.get(peer_id, priority))

    def declined(self, peer_id: str) -> None:
        """Release the room that was reserved for the peer."""
        if self._invited.pop(peer_id, None) is not None:
            self._end_exclusive(peer_id)

    def forget(self, peer_id: str) -> None:
        """Remove a peer that is gone."""
        self._invited.pop(peer_id, None)
        self._queue.pop(peer_id, None)
        self._end_exclusive(peer_id)

    def _end_exclusive(self, peer_id: str) -> None:
        if self._sole_peer == peer_id:
            self._sole_peer = ""

    def invite(self, num_granted: int) -> list[str]:
        """Reserve free room for the first peers in the queue, and return them.

        Invitations that were not answered in time end.
        """
        now = self._clock()
        for peer_id, since in list(self._invited.items()):
            if now - since > ANSWER_SECONDS:
                self.declined(peer_id)
        if self._sole_peer:
            if num_granted or self._invited:
                return []
            self._queue[self._sole_peer] = FIRST
            self._queue.move_to_end(self._sole_peer, last=False)
        invited = []
        while self._queue and num_granted + len(self._invited) < self.size:
            peer_id = min(self._queue, key=self._queue.__getitem__)
            del self._queue[peer_id]
            self._invited[peer_id] = now
            invited.append(peer_id)
            if self._sole_peer:
                break
        return invited

    @property
    def awaits_answer(self) -> bool:
        """Whether an invited peer has not answered yet."""
        return bool(self._invited)
