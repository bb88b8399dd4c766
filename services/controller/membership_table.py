"""The table of members and their leases. It has no socket and no clock of its own."""

from common.membership import DEAD, DRAINING
from common.progress import LEASE_SECONDS
from proto.twinlens.control.v1 import control_pb2

REMEMBER_DEAD_SECONDS = 60.0
"""How long a dead member stays in the table."""


class MembershipTable:
    """All members by id, including those that died recently.

    Times are seconds of a monotonic clock, which the caller passes in.
    """

    def __init__(self) -> None:
        self._members: dict[str, control_pb2.Member] = {}
        self._last_seen: dict[str, float] = {}
        """When each member reported last; for a dead member, when it was marked dead."""
        self.num_lost = 0
        """Members that died without draining first."""

    def __len__(self) -> int:
        return len(self._members)

    def report(self, member: control_pb2.Member, now: float) -> bool:
        """Store a member's report and renew its lease.

        Return whether watchers should be notified: the member is new, or something other than its
        load has changed.
        """
        old = self._members.get(member.id)
        self._members[member.id] = member
        self._last_seen[member.id] = now
        return old is None or without_load(old) != without_load(member)

    def mark_dead(self, member_id: str, now: float) -> bool:
        """Mark a member as dead, and return whether it was alive until now."""
        member = self._members.get(member_id)
        if member is None or member.state == DEAD:
            return False
        self.num_lost += member.state != DRAINING
        member.state = DEAD
        member.in_flight = 0
        member.queued = 0
        member.credits = 0
        self._last_seen[member_id] = now
        return True

    def expire(self, now: float) -> list[str]:
        """Mark members with an expired lease as dead, and return their ids.

        Members that have been dead for REMEMBER_DEAD_SECONDS are removed.
        """
        silence = {member_id: now - seen for member_id, seen in self._last_seen.items()}
        expired = [i for i, s in silence.items() if s > LEASE_SECONDS and self.is_alive(i)]
        removed = [i for i, s in silence.items() if s > REMEMBER_DEAD_SECONDS and self.is_dead(i)]
        for member_id in expired:
            self.mark_dead(member_id, now)
        for member_id in removed:
            del self._members[member_id]
            del self._last_seen[member_id]
        return expired

    def forget_oldest_dead(self) -> bool:
        """Remove the member that has been dead for longest, and return whether there was one."""
        dead = [member_id for member_id in self._members if self.is_dead(member_id)]
        if not dead:
            return False
        oldest = min(dead, key=self._last_seen.__getitem__)
        del self._members[oldest]
        del self._last_seen[oldest]
        return True

    def is_alive(self, member_id: str) -> bool:
        return member_id in self._members and self._members[member_id].state != DEAD

    def is_dead(self, member_id: str) -> bool:
        return member_id in self._members and self._members[member_id].state == DEAD

    def get(self, member_id: str) -> control_pb2.Member | None:
        return self._members.get(member_id)

    def members(self) -> list[control_pb2.Member]:
        """Return all members, sorted by role and id."""
        return sorted(self._members.values(), key=lambda m: (m.role, m.id))


def without_load(member: control_pb2.Member) -> bytes:
    """Return everything about the member but its load, in a form that can be compared."""
    copy = control_pb2.Member()
    copy.CopyFrom(member)
    copy.in_flight = 0
    copy.queued = 0
    copy.expected_delay = 0.0
    copy.credits = 0
    return copy.SerializeToString(deterministic=True)
