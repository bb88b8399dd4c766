"""Which preprocess may send an item next. This file knows no socket."""

import time
from collections import OrderedDict
from collections.abc import Callable

MAX_GRANTED = 2
"""One item is in the tower while the pixels of the next one arrive.

More would only hold memory, and keep items from other replicas.
"""
ANSWER_SECONDS = 2.0
"""The time for pixels to follow their grant, or for an offer to follow a vacancy.

After that the room goes to the next peer.
"""


class Room:
    """One budget of items for all producers.

    A peer that finds no room joins a queue. When room becomes free, it is reserved for the first
    peer in the queue for a moment. So no peer has to poll, and none is passed over.

        offer --room--> granted --------> tower --> done: room
          |                ^                          |
          no room          | offer                    v
          +--> in the queue --------vacancy------ invited --decline, or silence--> the next one
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.size = 1
        """The items granted at once.

        It is 1 until one was measured, because nobody knows how long a second would wait.
        """
        self._queue: OrderedDict[str, None] = OrderedDict()
        self._invited: dict[str, float] = {}

    def admits(self, peer_id: str, num_granted: int) -> bool:
        """Whether the peer may have another item while `num_granted` are granted in total.

        This answers the peer's invitation, if it has one.
        """
        self._invited.pop(peer_id, None)
        return num_granted + len(self._invited) < self.size

    def enqueue(self, peer_id: str) -> None:
        """Let the peer wait for room. A peer that waits already keeps its place."""
        self._queue.setdefault(peer_id)

    def declined(self, peer_id: str) -> None:
        """Release the room that was reserved for the peer."""
        self._invited.pop(peer_id, None)

    def forget(self, peer_id: str) -> None:
        """Remove a peer that is gone."""
        self._invited.pop(peer_id, None)
        self._queue.pop(peer_id, None)

    def invite(self, num_granted: int) -> list[str]:
        """Reserve free room for the first peers in the queue, and return them.

        Invitations that were not answered in time end.
        """
        now = self._clock()
        self._invited = {
            peer_id: since
            for peer_id, since in self._invited.items()
            if now - since <= ANSWER_SECONDS
        }
        invited = []
        while self._queue and num_granted + len(self._invited) < self.size:
            peer_id, _ = self._queue.popitem(last=False)
            self._invited[peer_id] = now
            invited.append(peer_id)
        return invited

    @property
    def awaits_answer(self) -> bool:
        """Whether an invited peer has not answered yet."""
        return bool(self._invited)
