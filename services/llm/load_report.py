"""Reports to each preprocess and gateway how busy this group is, and which adapters it has."""

import time
from collections.abc import Callable

from common.events import Sender
from common.messages import Adapters, LlmLoad, LlmOutbound
from services.llm.lora_registry import LoraRegistry
from services.llm.scheduler import Scheduler

REPORT_SECONDS = 0.25


class LoadReport:
    """Sends load and adapters when a peer connects, and when they change."""

    def __init__(
        self,
        links: Sender[LlmOutbound],
        scheduler: Scheduler,
        adapters: LoraRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._links = links
        self._scheduler = scheduler
        self._adapters = adapters
        self._clock = clock
        self._peers: set[str] = set()
        self._reported: LlmLoad | None = None
        self._next = 0.0

    def add(self, peer_id: str) -> None:
        """Report to this peer from now on, beginning with what holds at present."""
        self._peers.add(peer_id)
        self._links.send(peer_id, Adapters(adapters=self._adapters.listed()))
        self._links.send(peer_id, self._load())

    def remove(self, peer_id: str) -> None:
        self._peers.discard(peer_id)

    def send_adapters(self) -> None:
        """Send the adapters, because they have changed."""
        for peer_id in self._peers:
            self._links.send(peer_id, Adapters(adapters=self._adapters.listed()))

    def send_changes(self, at_once: bool) -> None:
        """Send a changed load, four times a second at most.

        With `at_once` it is sent in any case, because nothing will change for a while.
        """
        is_due = at_once or self._clock() >= self._next
        if is_due and (load := self._load()) != self._reported:
            self._reported = load
            self._next = self._clock() + REPORT_SECONDS
            for peer_id in self._peers:
                self._links.send(peer_id, load)

    def _load(self) -> LlmLoad:
        scheduler = self._scheduler
        return LlmLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_tokens=scheduler.pool.num_free * scheduler.block_size,
            capacity_tokens=scheduler.max_tokens,
        )
