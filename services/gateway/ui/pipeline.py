"""What the page shows of the pipeline: its stages, their members, and the gateway's own figures."""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import grpc
import msgspec

from common.membership import DEAD, READY, state_name
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.gateway.peers import Peers
from services.gateway.record import RequestState

LIST_SECONDS = 1.0
"""How long the controller may take to list its members."""
MAX_SHOWN = 48
"""The members of a stage that a snapshot has. The others are only counted."""


class WatchedCore(Protocol):
    """What the page needs from the gateway's core."""

    model_name: str
    peers: Peers
    first_token_seconds: deque[float]
    """The times to the first token of the latest requests, in seconds."""

    def unready_reason(self) -> str: ...

    def load(self) -> tuple[int, int]: ...

    def state_of(self, request_id: str) -> RequestState | None:
        """Return where the request with this id is; None if no such request is in flight."""
        ...


class Pipeline:
    """Describes the pipeline as JSON."""

    def __init__(self, core: WatchedCore, channel: grpc.aio.Channel) -> None:
        """`channel` leads to the controller, which alone knows the load of all members."""
        self._core = core
        self._control = control_pb2_grpc.ControlServiceStub(channel)

    async def describe(self) -> bytes:
        """Return the present state of the pipeline.

        Without the controller it is what the gateway heard last.
        """
        try:
            listed = await self._control.ListMembers(
                control_pb2.ListMembersRequest(), timeout=LIST_SECONDS
            )
        except grpc.RpcError:
            return self._snapshot(self._core.peers.members, is_current=False)
        return self._snapshot(listed.members, is_current=True)

    def _snapshot(self, members: Iterable[control_pb2.Member], is_current: bool) -> bytes:
        core = self._core
        in_flight, waiting = core.load()
        recent = core.first_token_seconds
        members = list(members)
        return msgspec.json.encode(
            {
                "model": core.model_name,
                "tasks": core.peers.tasks,
                "unready": core.unready_reason(),
                "is_current": is_current,
                "gateway": {
                    "in_flight": in_flight,
                    "waiting": waiting,
                    "first_token_seconds": statistics.median(recent) if recent else None,
                },
                "stages": [
                    stage_body(role, [m for m in members if m.role == role])
                    for role in ("gateway", *core.peers.stages)
                ],
            }
        )


def stage_body(role: str, members: Sequence[control_pb2.Member]) -> dict[str, Any]:
    """Return a stage with its members. If there are many, those that are not ready come first."""
    shown = sorted(members, key=lambda m: m.state == READY)[:MAX_SHOWN]
    return {
        "role": role,
        "ready": sum(m.state == READY and m.rank == 0 for m in members),
        "in_flight": sum(m.in_flight for m in members),
        "queued": sum(m.queued for m in members),
        "hidden": len(members) - len(shown),
        "members": [member_body(m) for m in sorted(shown, key=lambda m: m.id)],
    }


def member_body(member: control_pb2.Member) -> dict[str, Any]:
    """Return what the page shows of a member. Addresses, hosts and process ids are left out."""
    return {
        "id": member.id,
        "state": state_name(member.state),
        "detail": "" if member.state == DEAD else member.detail,
        "hung": member.hung,
        "in_flight": member.in_flight,
        "queued": member.queued,
        "credits": member.credits,
        "expected_delay": member.expected_delay,
        "rank": member.rank,
    }
