"""What a report to the controller may say. It is passed on to everybody, so it is bounded here."""

from common.settings import MAX_REPLICAS, SCALABLE_ROLES, SERVICES
from proto.twinlens.control.v1 import control_pb2

MAX_NAME_CHARS = 200
MAX_DETAIL_CHARS = 2000
MAX_SECONDS = 1e9
MAX_RANKS = 1024
NAMES = ("id", "address", "fingerprint", "group", "host")
"""The fields of a member that name something."""


def objection_to(request: control_pb2.JoinRequest) -> str:
    """Return what is wrong with a report, in words; empty if nothing is."""
    reason = _objection_to_member(request.member) if request.HasField("member") else ""
    if not reason and request.HasField("managed"):
        reason = _objection_to_managed(request.managed)
    return reason


def _objection_to_member(member: control_pb2.Member) -> str:
    for name in NAMES:
        value = getattr(member, name)
        if len(value) > MAX_NAME_CHARS or not value.isprintable():
            return f"{name} must have at most {MAX_NAME_CHARS} printable characters"
    if not member.id:
        return "id is missing"
    if member.role not in SERVICES or member.role == "controller":
        return f"role must be one of {', '.join(SERVICES)}, and not controller"
    if member.state not in control_pb2.MemberState.values():
        return "state must be one of MemberState"
    if member.rank >= MAX_RANKS:
        return f"rank must be below {MAX_RANKS}"
    if not 0 <= member.expected_delay <= MAX_SECONDS:
        return "expected_delay must be a number of seconds from 0"
    if len(member.detail) > MAX_DETAIL_CHARS or not member.detail.isprintable():
        return f"detail must have at most {MAX_DETAIL_CHARS} printable characters"
    return ""


def _objection_to_managed(managed: control_pb2.Managed) -> str:
    if not managed.replicas.keys() <= set(SCALABLE_ROLES):
        return f"managed.replicas has roles that are not among {', '.join(SCALABLE_ROLES)}"
    if any(count > MAX_REPLICAS for count in managed.replicas.values()):
        return f"managed.replicas has more than {MAX_REPLICAS} replicas of a role"
    if not managed.autoscaled.keys() <= set(SCALABLE_ROLES):
        return f"managed.autoscaled has roles that are not among {', '.join(SCALABLE_ROLES)}"
    if any(len(bounds) > MAX_NAME_CHARS for bounds in managed.autoscaled.values()):
        return "managed.autoscaled has bounds that are not MIN:MAX"
    return ""
