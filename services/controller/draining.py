"""Which members have been asked to drain, and which members may be."""

import asyncio
from collections.abc import Set

from common.membership import DEAD, READY
from proto.twinlens.control.v1 import control_pb2
from services.controller.membership_table import MembershipTable


class Drains:
    """The drains that operators have asked for."""

    def __init__(self, table: MembershipTable) -> None:
        self.drained: set[str] = set()
        """Every member that Drain was called for."""
        self._table = table
        self._requests: dict[str, asyncio.Event] = {}
        """By member that was asked to drain and has not started: set when it starts."""

    def request(self, member_id: str) -> asyncio.Event:
        """Ask the member to drain, and return an event that is set when it has started."""
        return self._requests.setdefault(member_id, asyncio.Event())

    def is_requested(self, member_id: str) -> bool:
        """Return whether the member has been asked to drain and has not started."""
        return member_id in self._requests

    def on_started(self, member_id: str) -> None:
        """Note that the member drains or is dead: no caller must wait for it any more."""
        if started := self._requests.pop(member_id, None):
            started.set()

    def keep(self, member_ids: Set[str]) -> None:
        """Forget all members but these."""
        self.drained &= member_ids

    def leader_of(self, member: control_pb2.Member) -> control_pb2.Member:
        """Return rank 0 of a language group's member, because rank 0 holds the requests."""
        if member.rank == 0:
            return member
        for other in self._table.members():
            is_same_group = (other.role, other.group, other.host) == (
                member.role,
                member.group,
                member.host,
            )
            if is_same_group and other.rank == 0 and other.state != DEAD:
                return other
        return member

    def is_last_ready(self, member: control_pb2.Member) -> bool:
        """Return whether no member of the role would be ready once this one drains."""
        if member.state != READY or self.is_requested(member.id):
            return False
        return not any(
            other.role == member.role
            and other.rank == 0
            and other.state == READY
            and other.id != member.id
            and not self.is_requested(other.id)
            for other in self._table.members()
        )
