"""The members that the gateway is connected to, and the choice among them."""

import time
from collections import Counter
from collections.abc import Callable, Iterable

from common.events import PeerDown, PeerUp, Sender
from common.membership import DEAD, READY
from common.messages import Abort, GatewayOutbound, Peer, Released
from proto.twinlens.control.v1 import control_pb2

STAGES = ("preprocess", "vision", "llm", "detokenizer")
CONNECTED_STAGES = ("preprocess", "llm", "detokenizer")
REMEMBERED_PEERS = 32


class Peers:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._up: dict[str, PeerUp] = {}
        self._draining: set[str] = set()
        self._released: set[str] = set()
        self._lost_at: dict[str, float] = {}
        """By role: when the last one of it went."""
        self._members: list[control_pb2.Member] = []
        self._unheard: dict[str, list[Abort]] = {}
        self.links: Sender[GatewayOutbound]

    # What the connections tell

    def on_members(self, members: list[control_pb2.Member]) -> None:
        self._members = [m for m in members if m.state != DEAD]

    def add(self, up: PeerUp) -> None:
        self._up[up.peer_id] = up
        for abort in self._unheard.pop(up.peer_id, []):
            self.links.send(up.peer_id, abort)

    def remove(self, down: PeerDown) -> None:
        self._draining.discard(down.peer_id)
        self._released.discard(down.peer_id)
        if self._up.pop(down.peer_id, None) and not self.connected(down.role):
            self._lost_at[down.role] = self._clock()

    def drain(self, peer_id: str) -> None:
        if peer_id in self._up:
            self._draining.add(peer_id)

    def release(self, peer_id: str) -> None:
        """It drains, and is told once that it need not wait for us."""
        if peer_id not in self._released:
            self._released.add(peer_id)
            self.links.send(peer_id, Released())

    # What is asked

    def connected(self, role: str) -> list[str]:
        return [peer_id for peer_id, up in self._up.items() if up.role == role]

    def draining(self, role: str) -> list[str]:
        return [peer_id for peer_id in self.connected(role) if peer_id in self._draining]

    def missing(self, since: float | None = None) -> list[str]:
        """The stages without anyone to give work to; with `since`, those for so many seconds or
        from the start on."""
        missing = [role for role in CONNECTED_STAGES if not self.connected(role)]
        if since is None:
            return missing
        return [
            role
            for role in missing
            if role not in self._lost_at or self._clock() - self._lost_at[role] > since
        ]

    def unready_reason(self) -> str:
        missing = [
            role
            for role in STAGES
            if not any(m.role == role and m.state == READY for m in self._members)
        ]
        missing += [role for role in self.missing() if role not in missing]
        return f"no {' and no '.join(missing)} is ready" if missing else ""

    def max_model_len(self) -> int | None:
        return (
            max(
                (m.max_model_len for m in self._members if m.role == "llm" and m.state == READY),
                default=0,
            )
            or None
        )

    def choose(self, role: str, holders: Iterable[str]) -> Peer:
        """Of the connected ones, the one that holds the fewest of our requests; not one that
        drains, and ready ones first."""
        connected = self.connected(role)
        held = Counter(holders)
        lasting = [peer_id for peer_id in connected if peer_id not in self._draining] or connected
        ready = {m.id for m in self._members if m.state == READY}
        best = min(
            [peer_id for peer_id in lasting if peer_id in ready] or lasting, key=held.__getitem__
        )
        return Peer(best, self._up[best].address)

    def to_avoid(self, lost: str) -> str:
        """Another language group than this one, where there is another."""
        return lost if any(peer_id != lost for peer_id in self.connected("llm")) else ""

    def abort(self, peer_id: str, abort: Abort) -> None:
        """A member that was frozen for a moment comes back under its id, and may hold, or still
        get, what we gave up."""
        if peer_id not in self._up:
            self._unheard.setdefault(peer_id, []).append(abort)
            if len(self._unheard) > REMEMBERED_PEERS:
                del self._unheard[next(iter(self._unheard))]
        self.links.send(peer_id, abort)
