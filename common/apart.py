"""Requests that may be what ends a process, and are therefore worked on apart from the others.

When a process dies, every request that it was working on may be the cause. Each of these suspects
is retried alone in its process. So another death has only one possible cause, and the others get
their answers. The gateway keeps the counts, because it outlives the process. It must know which
request is alone before the work begins, since a process that dies at once sends nothing any more:

    the process                      the gateway
      Alone         ------------->     notes that the next death is this request's
      begins it     <-------------   Noted
      its results   ------------->     it has passed
      others go on  <-------------   Cleared
"""

import time
from collections.abc import Callable

from common.messages import RequestKey

MAX_DEATHS = 3
"""A request or item fails when this many processes in a row have died while they worked on it. It
was alone in the last one, and in one before unless it had begun to answer."""
REPEAT_SECONDS = 1.0
"""Alone is sent again after this long without an answer, because the gateway may not be connected
yet."""


class Turn:
    """Which request, if any, has this process to itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.holder: RequestKey | None = None
        self.is_noted = False
        """Whether the gateway knows of the holder, so that its work may begin."""
        self._gateway_id = ""
        self._announce_at = 0.0

    def take(self, key: RequestKey, gateway_id: str) -> None:
        """Give the process to a request of this gateway. It must be free."""
        assert self.holder is None
        self.holder = key
        self._gateway_id = gateway_id
        self.is_noted = False
        self._announce_at = self._clock()

    def announcement(self) -> tuple[str, RequestKey] | None:
        """Return the gateway and the request of an Alone that is due now."""
        now = self._clock()
        if self.holder is None or self.is_noted or now < self._announce_at:
            return None
        self._announce_at = now + REPEAT_SECONDS
        return self._gateway_id, self.holder

    def note(self, key: RequestKey, peer_id: str) -> None:
        """Let the work on the request begin, if this peer is its gateway."""
        self.is_noted |= self._is_gateway_of(key, peer_id)

    def release(self, key: RequestKey, peer_id: str) -> bool:
        """End the turn of a request that the peer has cleared or ended, if it is its gateway.

        Returns whether it was.
        """
        is_released = self._is_gateway_of(key, peer_id)
        if is_released:
            self.holder = None
        return is_released

    def release_expired(self, key: RequestKey) -> None:
        """End the turn of a request that is past its deadline, when the gateway has ended it."""
        if key == self.holder:
            self.holder = None

    def release_all_of(self, gateway_id: str) -> None:
        """End the turn of a request whose gateway is gone."""
        if gateway_id == self._gateway_id:
            self.holder = None

    def _is_gateway_of(self, key: RequestKey, peer_id: str) -> bool:
        return (key, peer_id) == (self.holder, self._gateway_id)
