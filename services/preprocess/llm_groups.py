"""Which language group gets which request: by load, and by what its prefix cache has. Knows no
socket."""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from common.messages import LlmLoad, Peer
from services.preprocess.in_flight import MISSING_SECONDS
from services.preprocess.prepared import ExpandedPrompt

PREFIX_TOKENS = 64
"""Prompts are compared in steps of so many tokens."""
MAX_STEPS = 64
REMEMBERED_PREFIXES = 8192
"""Steps of a group's latest prompts: its cache forgets, too."""
CLEARLY_BUSIER = 4
"""A group with the prefix is left for another that has so many requests less, or half as many."""


@dataclass(slots=True, eq=False)
class Group:
    peer: Peer
    num_requests: int = 0
    """Running and waiting, as last told, and what was sent since."""
    free_tokens: int | None = None
    is_draining: bool = False
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def is_full_for(self, num_tokens: int) -> bool:
        """Whether its KV cache has no room for the prompt now."""
        return self.free_tokens is not None and self.free_tokens < num_tokens

    def match(self, steps: list[bytes]) -> int:
        """How many steps of the prompt this group has computed before."""
        return next((n for n, step in enumerate(steps) if step not in self.prefixes), len(steps))

    def remember(self, steps: list[bytes]) -> None:
        for step in steps:
            self.prefixes[step] = None
            self.prefixes.move_to_end(step)
        while len(self.prefixes) > REMEMBERED_PREFIXES:
            self.prefixes.popitem(last=False)


class LlmGroups:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._groups: dict[str, Group] = {}
        self._turn = itertools.count()
        self._lost = float("-inf")

    def add(self, peer: Peer) -> None:
        self._groups[peer.id] = Group(peer)

    def lose(self, llm_id: str) -> None:
        if self._groups.pop(llm_id, None):
            self._lost = self._clock()

    def has_other(self, avoid: str) -> bool:
        return any(
            llm_id != avoid and not group.is_draining for llm_id, group in self._groups.items()
        )

    def missing_too_long(self) -> bool:
        """A group that was lost a moment ago may come back, and one that drains may have a
        successor: it is waited for."""
        return self._clock() - self._lost > MISSING_SECONDS

    def drain(self, llm_id: str) -> None:
        """It would not come to its end if all that is new went on to it."""
        if group := self._groups.get(llm_id):
            group.is_draining = True
            self._lost = self._clock()

    def update_load(self, llm_id: str, load: LlmLoad) -> None:
        if group := self._groups.get(llm_id):
            group.num_requests = load.running + load.waiting
            group.free_tokens = load.free_tokens

    def __len__(self) -> int:
        return len(self._groups)

    def choose(self, prompt: ExpandedPrompt, mm_hashes: list[str], avoid: str = "") -> Peer | None:
        """The group for a prompt, which counts as sent there; None where there is none. A draining
        group only where there is no other."""
        candidates = [group for group in self._groups.values() if group.peer.id != avoid]
        candidates = [group for group in candidates if not group.is_draining] or candidates
        if not candidates:
            return None
        steps = prefix_steps(prompt, mm_hashes)
        group = self._best(candidates, steps, prompt.num_tokens)
        group.num_requests += 1
        group.remember(steps)
        return group.peer

    def _best(self, candidates: list[Group], steps: list[bytes], num_tokens: int) -> Group:
        turn = next(self._turn) % len(candidates)
        in_turn = candidates[turn:] + candidates[:turn]
        least = min(in_turn, key=lambda group: (group.is_full_for(num_tokens), group.num_requests))
        matching = max(in_turn, key=lambda group: group.match(steps))
        is_clearly_busier = matching.num_requests > max(
            least.num_requests + CLEARLY_BUSIER, 2 * least.num_requests
        )
        return (
            matching
            if matching.match(steps) > least.match(steps) and not is_clearly_busier
            else least
        )


def prefix_steps(prompt: ExpandedPrompt, mm_hashes: list[str]) -> list[bytes]:
    """A name for each of the prompt's first whole steps: equal names mean equal tokens and images
    up to there."""
    names: list[bytes] = []
    parent = prompt.cache_salt
    ids = prompt.token_ids
    images = list(zip(prompt.placeholders.tolist(), mm_hashes, strict=True))
    for start in range(
        0, min(len(ids), MAX_STEPS * PREFIX_TOKENS) - PREFIX_TOKENS + 1, PREFIX_TOKENS
    ):
        stop = start + PREFIX_TOKENS
        contents = "".join(
            mm_hash
            for (offset, length), mm_hash in images
            if offset < stop and offset + length > start
        )
        parent = blake2b(
            parent + ids[start:stop].tobytes() + contents.encode(), digest_size=16
        ).digest()
        names.append(parent)
    return names
