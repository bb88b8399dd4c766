"""Who may send an image next. Knows no socket."""

import time
from collections import OrderedDict
from collections.abc import Callable

# One image in the tower and one whose pixels come meanwhile: more would only hold memory, and keep
# images from other replicas.
MAX_GRANTED = 2
ANSWER_SECONDS = 2.0
"""For pixels to follow their grant, or an offer its vacancy: after that the room is another's."""


class Room:
    """One budget for all producers. Who found no room is in a queue; room that comes is offered to
    the first in it and kept for a moment, so that nobody asks twice and nobody is passed over.

        offer --room--> granted --------> tower --> done: room
          |                ^                          |
          no room          | offer                    v
          +--> in the queue --------vacancy------ invited --decline, or silence--> the next one
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.size = 1
        """Images granted at once: one alone while nobody knows how long they take here, and so how
        long a second would wait."""
        self._queue: OrderedDict[str, None] = OrderedDict()
        self._invited: dict[str, float] = {}

    def admits(self, peer_id: str, num_granted: int) -> bool:
        """Whether the peer may have an image more, where `num_granted` are granted to all together.
        Answers its invitation."""
        self._invited.pop(peer_id, None)
        return num_granted + len(self._invited) < self.size

    def enqueue(self, peer_id: str) -> None:
        self._queue.setdefault(peer_id)

    def declined(self, peer_id: str) -> None:
        self._invited.pop(peer_id, None)

    def forget(self, peer_id: str) -> None:
        self._invited.pop(peer_id, None)
        self._queue.pop(peer_id, None)

    def invite(self, num_granted: int) -> list[str]:
        """Whom to tell of a vacancy now."""
        now = self._clock()
        for peer_id in [
            peer_id for peer_id, invited in self._invited.items() if now - invited > ANSWER_SECONDS
        ]:
            del self._invited[peer_id]
        invited = []
        while self._queue and num_granted + len(self._invited) < self.size:
            peer_id, _ = self._queue.popitem(last=False)
            self._invited[peer_id] = now
            invited.append(peer_id)
        return invited

    @property
    def awaits_answer(self) -> bool:
        return bool(self._invited)
