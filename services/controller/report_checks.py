"""What a report to the controller may say. It is passed on to everybody, so it is bounded here."""

from common.address import objection_to_peer
from common.membership import DRAINING, MAX_DELAY_SECONDS, READY, STANDBY, STARTING
from common.messages import TASKS, Peer
from common.settings import MAX_RANKS, MAX_REPLICAS, SCALABLE_ROLES, SERVICES, TOKENS
from proto.twinlens.control.v1 import control_pb2

MAX_MEMBER_BYTES = 2048
"""The size of a member's entry. Watchers get all entries in one message."""
MAX_NAME_CHARS = 256
MAX_DETAIL_CHARS = 500
MAX_PID = 2**22
"""The largest id of a process on Linux."""
MAX_CREDITS = 2**20
REPORTED_STATES = (STARTING, READY, DRAINING, STANDBY)
NAMES = ("id", "address", "fingerprint", "group", "host")
"""The fields of a member that name something."""


def objection_to(request: control_pb2.JoinRequest) -> str:
    """Return what is wrong with a report, in words; empty if nothing is."""
    if request.HasField("member") and request.HasField("managed"):
        return "a member is no launcher: send only one of member and managed"
    if len(request.key) > MAX_NAME_CHARS:
        return f"key must have at most {MAX_NAME_CHARS} characters"
    reason = _objection_to_member(request.member) if request.HasField("member") else ""
    if not reason and request.HasField("managed"):
        reason = _objection_to_managed(request.managed)
    return reason


def _objection_to_member(member: control_pb2.Member) -> str:
    if member.ByteSize() > MAX_MEMBER_BYTES:  # unknown fields count, too
        return f"member must have at most {MAX_MEMBER_BYTES} bytes"
    for name in NAMES:
        value = getattr(member, name)
        if len(value) > MAX_NAME_CHARS or not value.isprintable():
            return f"{name} must have at most {MAX_NAME_CHARS} printable characters"
    if not member.id:
        return "id is missing"
    if member.role not in SERVICES or member.role == "controller":
        return f"role must be one of {', '.join(SERVICES)}, and not controller"
    if member.address and objection_to_peer(Peer(member.id, member.address)):
        return "address must be tcp://HOST:PORT or ipc://PATH"
    if member.state not in REPORTED_STATES:
        return "state must be one that a living member has"
    if member.rank >= MAX_RANKS:
        return f"rank must be below {MAX_RANKS}"
    if member.pid > MAX_PID or member.max_model_len > TOKENS.most:
        return f"pid must be at most {MAX_PID}, and max_model_len {TOKENS.most}"
    if not 0 <= member.expected_delay <= MAX_DELAY_SECONDS:
        return "expected_delay must be a number of seconds from 0"
    if member.credits > MAX_CREDITS:
        return f"credits must be at most {MAX_CREDITS}"
    if len(member.detail) > MAX_DETAIL_CHARS or not member.detail.isprintable():
        return f"detail must have at most {MAX_DETAIL_CHARS} printable characters"
    if not set(member.tasks) <= set(TASKS):
        return f"tasks must be among {', '.join(TASKS)}"
    if not set(member.stages) <= set(SERVICES):
        return f"stages must be among {', '.join(SERVICES)}"
    return ""


def _objection_to_managed(managed: control_pb2.Managed) -> str:
    if not managed.replicas.keys() <= set(SCALABLE_ROLES):
        return f"managed.replicas has roles that are not among {', '.join(SCALABLE_ROLES)}"
    if any(count > MAX_REPLICAS for count in managed.replicas.values()):
        return f"managed.replicas has more than {MAX_REPLICAS} replicas of a role"
    if not managed.autoscaled.keys() <= set(SCALABLE_ROLES):
        return f"managed.autoscaled has roles that are not among {', '.join(SCALABLE_ROLES)}"
    if any(
        len(bounds) > MAX_NAME_CHARS or not bounds.isprintable()
        for bounds in managed.autoscaled.values()
    ):
        return "managed.autoscaled has bounds that are not MIN:MAX"
    return ""
