"""Chooses the language group of each request, by load and by prefix cache. Uses no socket."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

from common.messages import Adapters, LlmLoad, Peer
from services.preprocess.heap import NO_ENTRY, Heap
from services.preprocess.in_flight import MISSING_SECONDS
from services.preprocess.prepared import ExpandedPrompt

PREFIX_TOKENS = 64
"""Prompts are compared in steps of this many tokens."""
MAX_STEPS = 64
REMEMBERED_PREFIXES = 8192
"""How many steps of a group's latest prompts are remembered. Its prefix cache forgets, too."""
NUM_LOOKED_AT = 8
"""How many groups a choice looks at, however many there are."""
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
    adapters: frozenset[str] = frozenset()
    """The names of its LoRA adapters, by its last report."""
    entry: int = NO_ENTRY
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def is_full_for(self, num_tokens: int) -> bool:
        """Whether its KV cache has no room for the prompt now."""
        return self.free_tokens is not None and self.free_tokens < num_tokens

    def has(self, adapter: str) -> bool:
        """Whether it can compute with a LoRA adapter; every group can without one ("")."""
        return adapter == "" or adapter in self.adapters

    def match(self, steps: list[bytes]) -> int:
        """Return how many steps of the prompt this group has computed before."""
        return next((n for n, step in enumerate(steps) if step not in self.prefixes), len(steps))


class LlmGroups:
    """The connected language groups."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._groups: dict[str, Group] = {}
        self._lasting = Heap[Group]()
        """The groups that are not draining, by their number of requests."""
        self._draining = Heap[Group]()
        self._holders: dict[bytes, dict[str, None]] = {}
        """By step: the ids of the groups that remember it."""
        self._lost = float("-inf")

    def add(self, peer: Peer) -> None:
        self.remove(peer.id)
        self._groups[peer.id] = group = Group(peer)
        self._put(group)

    def remove(self, llm_id: str) -> None:
        """Forget a dead group."""
        if group := self._groups.pop(llm_id, None):
            group.entry = NO_ENTRY
            for step in group.prefixes:
                self._forget_holder(step, llm_id)
            self._lost = self._clock()

    def _put(self, group: Group) -> None:
        """Put a group where it belongs, because something about it has changed."""
        heap = self._draining if group.is_draining else self._lasting
        heap.put(group, group.num_requests, len(self._groups))

    def _forget_holder(self, step: bytes, llm_id: str) -> None:
        holders = self._holders[step]
        del holders[llm_id]
        if not holders:
            del self._holders[step]

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
            self._put(group)
            self._lost = self._clock()

    def update_load(self, llm_id: str, load: LlmLoad) -> None:
        if group := self._groups.get(llm_id):
            group.num_requests = load.running + load.waiting
            group.free_tokens = load.free_tokens
            self._put(group)

    def update_adapters(self, llm_id: str, report: Adapters) -> None:
        if group := self._groups.get(llm_id):
            group.adapters = frozenset(adapter.name for adapter in report.adapters)

    def __len__(self) -> int:
        return len(self._groups)

    def choose(
        self, prompt: ExpandedPrompt, mm_hashes: list[str], avoid: str = "", adapter: str = ""
    ) -> Peer | None:
        """Choose the group for a prompt, which then counts as sent there.

        A draining group is chosen only if there is no other. None: there is no group, or none has
        the adapter.
        """
        least = self._least_busy(prompt.num_tokens, avoid, adapter)
        if least is None:
            return None
        steps = prefix_steps(prompt, mm_hashes, adapter)
        group = self._with_prefix(steps, least, avoid, adapter) or least
        group.num_requests += 1
        self._put(group)
        self._remember(group, steps)
        return group.peer

    def _least_busy(self, num_tokens: int, avoid: str, adapter: str) -> Group | None:
        """Return the group with the fewest requests, rather one whose KV cache has room.

        Equally good groups take turns. An adapter may be at any group, so all are looked at.
        """
        count = len(self._groups) if adapter else NUM_LOOKED_AT
        for heap in (self._lasting, self._draining):
            groups = [g for g in heap.first(count) if g.peer.id != avoid and g.has(adapter)]
            if groups:
                return next((g for g in groups if not g.is_full_for(num_tokens)), groups[0])
        return None

    def _with_prefix(
        self, steps: list[bytes], least: Group, avoid: str, adapter: str
    ) -> Group | None:
        """Return a group with a longer prefix than the least busy one, unless it is clearly busier.

        Of the groups with the prompt's longest known step, a few are looked at.
        """
        deepest = next((step for step in reversed(steps) if step in self._holders), None)
        if deepest is None or deepest in least.prefixes:
            return None
        holders = islice(self._holders[deepest], NUM_LOOKED_AT)
        groups = [self._groups[llm_id] for llm_id in holders if llm_id != avoid]
        groups = [g for g in groups if g.is_draining <= least.is_draining and g.has(adapter)]
        if not groups:
            return None
        group = min(groups, key=lambda group: (-group.match(steps), group.num_requests))
        most = max(least.num_requests + CLEARLY_BUSIER, 2 * least.num_requests)
        is_better = group.match(steps) > least.match(steps) and group.num_requests <= most
        return group if is_better else None

    def _remember(self, group: Group, steps: list[bytes]) -> None:
        """Note that a group computes a prompt with these steps."""
        for step in steps:
            group.prefixes[step] = None
            group.prefixes.move_to_end(step)
            self._holders.setdefault(step, {})[group.peer.id] = None
        while len(group.prefixes) > REMEMBERED_PREFIXES:
            step, _ = group.prefixes.popitem(last=False)
            self._forget_holder(step, group.peer.id)


def prefix_steps(prompt: ExpandedPrompt, mm_hashes: list[str], adapter: str = "") -> list[bytes]:
    """Return a name for each of the prompt's first whole steps.

    Equal names mean the same adapter, and equal tokens and items up to the end of the step.
    """
    names: list[bytes] = []
    parent = prompt.cache_salt + adapter.encode()
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
