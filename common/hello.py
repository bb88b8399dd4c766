"""The first message on every connection."""

from common.messages import PROTOCOL_VERSION, Hello


def hello(member_id: str, role: str, fingerprint: str = "") -> Hello:
    """Return the Hello of a process of this release."""
    return Hello(
        protocol_version=PROTOCOL_VERSION, id=member_id, role=role, fingerprint=fingerprint
    )
