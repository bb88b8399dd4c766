"""Who may join: an id belongs to one member while it lives, and no address takes up all places."""

import hmac
from collections import Counter

import grpc

from common.membership import DEAD
from proto.twinlens.control.v1 import control_pb2
from services.controller.membership_table import MembershipTable
from services.controller.reachability import unreachable_reason

MAX_MEMBERS = 4096
"""Members in the table, including those that died within the last minute."""
MAX_WATCHERS = 1024
MAX_SHARE = 0.5
"""The share of all members, or of all watchers, that may come from one address."""


class Refused(Exception):
    """The caller may not join, for a reason in words."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Places:
    """What is known about the callers behind the members of the table."""

    def __init__(self, table: MembershipTable, controller_id: str, launcher_key: str) -> None:
        """`launcher_key` is what a launcher must know. If it is empty, the first one may stay."""
        self._table = table
        self._controller_id = controller_id
        self._launcher_key = launcher_key
        self._keys: dict[str, str] = {}
        """The key of each member, by its id."""
        self._locations: dict[str, str] = {}
        """Where each member runs, by its id."""

    def check_member(self, member: control_pb2.Member, key: str, location: str) -> None:
        """Check that a member may join from this location, and remember both.

        A member whose connection broke takes its own place again, because it has the key.

        Raises
        ------
        Refused
            if another caller is the member, if there is no room, or if a peer could not reach it.
        """
        known_key = self._keys.get(member.id, "")
        is_taken = self._table.is_alive(member.id) or bool(known_key)
        is_itself = bool(known_key) and is_equal(known_key, key)
        if member.id == self._controller_id or (is_taken and not is_itself):
            reason = f"there is a member {member.id} already: join under another id"
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, reason)
        if self._table.get(member.id) is None:
            self._check_room(location)
        if reason := unreachable_reason(member, location, self._others(member)):
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, reason)
        self._keys[member.id] = key
        self._locations[member.id] = location

    def check_launcher(self, key: str, has_launcher: bool) -> None:
        """Raise Refused if the caller cannot be the launcher."""
        if not is_equal(self._launcher_key, key):
            reason = "only the launcher that started this controller can manage its members"
            raise Refused(grpc.StatusCode.PERMISSION_DENIED, reason)
        if has_launcher and not key:
            reason = "a launcher has joined already: give each one its own controller"
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, reason)

    def check_watcher(self, location: str, locations: list[str]) -> None:
        """Raise Refused if there is no room next to the watchers at these locations."""
        is_full = len(locations) >= MAX_WATCHERS
        if is_full or locations.count(location) >= max(1, MAX_SHARE * MAX_WATCHERS):
            reason = f"there are {len(locations)} watchers: end some"
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    def keep(self, member_ids: set[str]) -> None:
        """Forget all members but these."""
        for known in (self._keys, self._locations):
            for member_id in known.keys() - member_ids:
                del known[member_id]

    def _check_room(self, location: str) -> None:
        """Raise Refused if there is no room for another member from this location.

        Dead members are only remembered for people, so they make room.
        """
        members = self._table.members()
        if len(members) >= MAX_MEMBERS and not self._table.forget_oldest_dead():
            reason = f"there are {MAX_MEMBERS} members, which is the most"
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        living = Counter(self._locations[m.id] for m in members if m.state != DEAD)
        if living[location] >= max(1, MAX_SHARE * MAX_MEMBERS):
            reason = f"there are {living[location]} members from this address, which is the most"
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    def _others(self, member: control_pb2.Member) -> list[tuple[control_pb2.Member, str]]:
        """Return the living members, except this one, with their locations."""
        return [
            (other, self._locations[other.id])
            for other in self._table.members()
            if other.state != DEAD and other.id != member.id
        ]


def is_equal(key: str, other: str) -> bool:
    return hmac.compare_digest(key.encode(), other.encode())
