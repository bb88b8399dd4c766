"""The members that the gateway is connected to, and the choice among them."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

from common.events import PeerDown, PeerUp, Sender
from common.membership import DEAD, READY
from common.messages import Abort, GatewayOutbound, LlmLoad, Peer, Released
from proto.twinlens.control.v1 import control_pb2

STAGES = ("preprocess", "vision", "llm", "detokenizer")
CONNECTED_STAGES = ("preprocess", "llm", "detokenizer")
MAX_PEERS_WITH_UNSENT_ABORTS = 32
"""The gateway keeps aborts for at most this many disconnected members."""
MAX_UNSENT_ABORTS = 10_000
"""The gateway keeps at most this many aborts, the latest, for each of them."""


class Peers:
    """What the gateway knows about other members, from its connections and from the controller."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._connected: dict[str, PeerUp] = {}
        self._draining: set[str] = set()
        self._released: set[str] = set()
        self._last_lost_at: dict[str, float] = {}
        """By role: when the last connected member of the role was lost."""
        self.members: list[control_pb2.Member] = []
        """Every live member that the controller knows."""
        self.changed = asyncio.Event()
        """Set when the members or their states changed. The one that waits for it clears it."""
        self._ready_ids: set[str] = set()
        self._ready_roles: set[str] = set()
        self.tasks: tuple[str, ...] = ("generate",)
        """What the served model does. The gateway opens no checkpoint: preprocess reports it."""
        self.stages: tuple[str, ...] = STAGES
        """The roles that requests to the served model pass through."""
        self._llm_loads: dict[str, LlmLoad] = {}
        """The last report of each connected language group."""
        self._unsent_aborts: dict[str, deque[Abort]] = {}
        """By member: the aborts that were due while it was disconnected."""
        self.links: Sender[GatewayOutbound]

    # Events of the connections and of the controller

    def on_members(self, members: list[control_pb2.Member]) -> None:
        """Store the members that the controller knows."""
        self.members = [m for m in members if m.state != DEAD]
        ready = [m for m in members if m.state == READY]
        self._ready_ids = {m.id for m in ready}
        self._ready_roles = {m.role for m in ready}
        for member in self.members:
            if member.role == "preprocess" and member.tasks and member.stages:
                self.tasks = tuple(member.tasks)
                self.stages = tuple(role for role in STAGES if role in member.stages)
        self.changed.set()

    def on_peer_up(self, up: PeerUp) -> None:
        """Store a connected member and send it the aborts that it missed."""
        self._connected[up.peer_id] = up
        for abort in self._unsent_aborts.pop(up.peer_id, ()):
            self.links.send(up.peer_id, abort)

    def on_peer_down(self, down: PeerDown) -> None:
        """Forget a disconnected member."""
        self._draining.discard(down.peer_id)
        self._released.discard(down.peer_id)
        self._llm_loads.pop(down.peer_id, None)
        if self._connected.pop(down.peer_id, None) and not self.connected(down.role):
            self._last_lost_at[down.role] = self._clock()

    def on_peer_draining(self, peer_id: str) -> None:
        """Mark a member as draining: it gets new work only if no other member can take it."""
        if peer_id in self._connected:
            self._draining.add(peer_id)

    def on_llm_load(self, peer_id: str, load: LlmLoad) -> None:
        """Store how busy a connected language group is."""
        if self.role_of(peer_id) == "llm":
            self._llm_loads[peer_id] = load

    # Messages

    def send_released(self, peer_id: str) -> None:
        """Tell a draining member, once, that it need not wait for this gateway."""
        if peer_id not in self._released:
            self._released.add(peer_id)
            self.links.send(peer_id, Released())

    def send_abort(self, peer_id: str, abort: Abort) -> None:
        """Send an abort to a member, and once more if it is disconnected and comes back.

        A member that froze for a moment comes back under the same id. By then it may hold what the
        gateway has given up, or receive it late over another connection.
        """
        if peer_id not in self._connected:
            unsent = self._unsent_aborts.setdefault(peer_id, deque(maxlen=MAX_UNSENT_ABORTS))
            unsent.append(abort)
            if len(self._unsent_aborts) > MAX_PEERS_WITH_UNSENT_ABORTS:
                del self._unsent_aborts[next(iter(self._unsent_aborts))]
        self.links.send(peer_id, abort)

    # Queries

    def connected(self, role: str) -> list[str]:
        """Return the ids of the connected members of a role."""
        return [peer_id for peer_id, up in self._connected.items() if up.role == role]

    def role_of(self, peer_id: str) -> str:
        """Return the role of a connected member; empty if it is not connected."""
        up = self._connected.get(peer_id)
        return up.role if up else ""

    def draining(self, role: str) -> list[str]:
        """Return the ids of the connected members of a role that are draining."""
        return [peer_id for peer_id in self.connected(role) if peer_id in self._draining]

    def missing(self, min_seconds: float | None = None) -> list[str]:
        """Return the stages without a connected member.

        With `min_seconds`, a stage that lost its last member more recently than that is left out.
        """
        connected = [role for role in CONNECTED_STAGES if role in self.stages]
        missing = [role for role in connected if not self.connected(role)]
        if min_seconds is None:
            return missing
        now = self._clock()
        return [
            role
            for role in missing
            if role not in self._last_lost_at or now - self._last_lost_at[role] > min_seconds
        ]

    def unready_reason(self) -> str:
        """Return which stages are not ready or not connected; empty if every stage is."""
        missing = [role for role in self.stages if role not in self._ready_roles]
        missing += [role for role in self.missing() if role not in missing]
        return f"no {' and no '.join(missing)} is ready" if missing else ""

    def max_model_len(self) -> int | None:
        """Return the longest context of all ready language groups, or None if none is ready."""
        lengths = [m.max_model_len for m in self.members if m.role == "llm" and m.state == READY]
        return max(lengths, default=0) or None

    def kv_cache_usage(self) -> float:
        """Return which share of the KV cache is in use: the mean of the connected groups, or 0.

        The thread of a scrape calls this, too.
        """
        loads = list(self._llm_loads.values())
        usages = [
            1 - min(load.free_tokens / load.capacity_tokens, 1.0)
            for load in loads
            if load.capacity_tokens
        ]
        return sum(usages) / len(usages) if usages else 0.0

    def choose(self, role: str, holders: Iterable[str]) -> Peer:
        """Return the connected member of the role that holds the fewest of this gateway's requests.

        `holders` has the id of a member for each request that the member holds. A draining member
        is the last resort, and a ready member is preferred to one that is not.
        """
        connected = self.connected(role)
        num_held = Counter(holders)
        lasting = [peer_id for peer_id in connected if peer_id not in self._draining] or connected
        candidates = [peer_id for peer_id in lasting if peer_id in self._ready_ids] or lasting
        best = min(candidates, key=num_held.__getitem__)
        return Peer(best, self._connected[best].address)

    def group_to_avoid(self, lost: str) -> str:
        """Return `lost` if another language group is connected; empty if there is no choice."""
        return lost if any(peer_id != lost for peer_id in self.connected("llm")) else ""
