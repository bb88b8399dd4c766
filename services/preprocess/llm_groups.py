"""Chooses the language group of each request, by load and by prefix cache. Uses no socket."""

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
"""Prompts are compared in steps of this many tokens."""
MAX_STEPS = 64
REMEMBERED_PREFIXES = 8192
"""How many steps of a group's latest prompts are remembered. Its prefix cache forgets, too."""
CLEARLY_BUSIER = 4
"""A prompt leaves the group with its prefix if another has this many requests fewer, or at most
half as many."""


@dataclass(slots=True, eq=False)
class Group:
    """A connected language group."""

    peer: Peer
    num_requests: int = 0
    """The running and waiting requests, by its last report and what it was sent since."""
    free_tokens: int | None = None
    """The tokens that its KV cache has room for, by its last report."""
    is_draining: bool = False
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def is_full_for(self, num_tokens: int) -> bool:
        """Whether its KV cache has no room for the prompt now."""
        return self.free_tokens is not None and self.free_tokens < num_tokens

    def match(self, steps: list[bytes]) -> int:
        """Return how many steps of the prompt this group has computed before."""
        return next((n for n, step in enumerate(steps) if step not in self.prefixes), len(steps))

    def remember(self, steps: list[bytes]) -> None:
        """Note that this group computes a prompt with these steps."""
        for step in steps:
            self.prefixes[step] = None
            self.prefixes.move_to_end(step)
        while len(self.prefixes) > REMEMBERED_PREFIXES:
            self.prefixes.popitem(last=False)


class LlmGroups:
    """The connected language groups."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._groups: dict[str, Group] = {}
        self._turn = itertools.count()
        self._lost = float("-inf")

    def add(self, peer: Peer) -> None:
        self._groups[peer.id] = Group(peer)

    def remove(self, llm_id: str) -> None:
        """Forget a dead group."""
        if self._groups.pop(llm_id, None):
            self._lost = self._clock()

    def has_other(self, avoid: str) -> bool:
        """Whether there is a group that is neither draining nor the one to avoid."""
        return any(
            llm_id != avoid and not group.is_draining for llm_id, group in self._groups.items()
        )

    def missing_too_long(self) -> bool:
        """Whether requests should no longer wait for a group that is gone or draining.

        A group that was lost a moment ago may come back. One that drains may have a successor.
        """
        return self._clock() - self._lost > MISSING_SECONDS

    def drain(self, llm_id: str) -> None:
        """Give new requests to other groups. Otherwise a draining group would never end."""
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
        """Choose the group for a prompt, which then counts as sent there.

        A draining group is chosen only if there is no other. None: there is no group.
        """
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
        """Return the group with the longest prefix, unless it is clearly busier than another.

        Equally good groups take turns.
        """
        turn = next(self._turn) % len(candidates)
        in_turn = candidates[turn:] + candidates[:turn]
        least = min(in_turn, key=lambda group: (group.is_full_for(num_tokens), group.num_requests))
        matching = max(in_turn, key=lambda group: group.match(steps))
        is_clearly_busier = matching.num_requests > max(
            least.num_requests + CLEARLY_BUSIER, 2 * least.num_requests
        )
        if matching.match(steps) > least.match(steps) and not is_clearly_busier:
            return matching
        return least


def prefix_steps(prompt: ExpandedPrompt, mm_hashes: list[str]) -> list[bytes]:
    """Return a name for each of the prompt's first whole steps.

    Equal names mean equal tokens and items up to the end of the step.
    """
    names: list[bytes] = []
    parent = prompt.cache_salt
    items = list(zip(prompt.placeholders.tolist(), mm_hashes, strict=True))
    for step in range(min(prompt.num_tokens // PREFIX_TOKENS, MAX_STEPS)):
        start = step * PREFIX_TOKENS
        stop = start + PREFIX_TOKENS
        contents = "".join(
            mm_hash
            for (offset, length), mm_hash in items
            if offset < stop and offset + length > start
        )
        data = prompt.token_ids[start:stop].tobytes() + contents.encode()
        parent = blake2b(parent + data, digest_size=16).digest()
        names.append(parent)
    return names
