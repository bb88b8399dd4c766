"""Tells each preprocess how busy this group is."""

import time
from collections.abc import Callable
from typing import Any

from common.messages import LlmLoad
from services.llm.scheduler import Scheduler

REPORT_SECONDS = 0.25


class LoadReport:
    def __init__(
        self, links: Any, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._links = links
        self._scheduler = scheduler
        self._clock = clock
        self._peers: set[str] = set()
        self._told: LlmLoad | None = None
        self._next = 0.0

    def add(self, preprocess_id: str) -> None:
        self._peers.add(preprocess_id)
        self._links.send(preprocess_id, self._load())

    def remove(self, preprocess_id: str) -> None:
        self._peers.discard(preprocess_id)

    def tell(self, at_once: bool) -> None:
        """What changed, now and then; `at_once` where nothing will change for a while."""
        if (at_once or self._clock() >= self._next) and (load := self._load()) != self._told:
            self._told = load
            self._next = self._clock() + REPORT_SECONDS
            for peer_id in self._peers:
                self._links.send(peer_id, load)

    def _load(self) -> LlmLoad:
        scheduler = self._scheduler
        return LlmLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_tokens=scheduler.pool.num_free * scheduler.block_size,
        )
