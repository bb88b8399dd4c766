"""Who is a member, and since when they are dead. No socket, no clock of its own."""

from common.membership import DEAD
from common.progress import LEASE_SECONDS
from proto.twinlens.control.v1 import control_pb2

REMEMBER_DEAD_SECONDS = 60.0


class MembershipTable:
    """Times are seconds of a monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._members: dict[str, control_pb2.Member] = {}
        self._heard: dict[str, float] = {}

    def report(self, member: control_pb2.Member, now: float) -> bool:
        """Takes a member's report. True where others should hear of it: it is new, or more than its
        load changed."""
        old = self._members.get(member.id)
        self._members[member.id] = member
        self._heard[member.id] = now
        return old is None or identity(old) != identity(member)

    def end(self, member_id: str, now: float) -> bool:
        """Its stream broke or its lease ended. True where it lived until now."""
        member = self._members.get(member_id)
        if member is None or member.state == DEAD:
            return False
        member.state = DEAD
        member.in_flight = 0
        member.queued = 0
        self._heard[member_id] = now
        return True

    def expire(self, now: float) -> list[str]:
        """Ends the leases that are due and forgets those long dead; gives the ids whose lease
        ended."""
        late = [
            i for i, heard in self._heard.items() if self.lives(i) and now - heard > LEASE_SECONDS
        ]
        for member_id in late:
            self.end(member_id, now)
        for member_id in [
            i
            for i, heard in self._heard.items()
            if not self.lives(i) and now - heard > REMEMBER_DEAD_SECONDS
        ]:
            del self._members[member_id], self._heard[member_id]
        return late

    def lives(self, member_id: str) -> bool:
        return member_id in self._members and self._members[member_id].state != DEAD

    def get(self, member_id: str) -> control_pb2.Member | None:
        return self._members.get(member_id)

    def members(self) -> list[control_pb2.Member]:
        return sorted(self._members.values(), key=lambda m: (m.role, m.id))


def identity(member: control_pb2.Member) -> bytes:
    """Everything but the load, which changes all the time."""
    known = control_pb2.Member()
    known.CopyFrom(member)
    known.in_flight = known.queued = 0
    known.expected_delay = 0.0
    return known.SerializeToString(deterministic=True)
