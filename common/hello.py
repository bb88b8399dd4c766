"""The first message on every connection."""

from common.messages import PROTOCOL_VERSION, Hello
from common.wire import Buffer, WireError, decode, encode


def is_hello(frames: list[Buffer]) -> bool:
    """Whether this message is a Hello, at the cost of comparing a few bytes if it is not.

    A peer that connects again under its old id sends one.
    """
    if len(frames) > 1 or bytes(frames[0][: len(HELLO_START)]) != HELLO_START:
        return False
    try:
        return isinstance(decode(frames, Hello), Hello)
    except WireError:
        return False


def hello(member_id: str, role: str, fingerprint: str = "") -> Hello:
    """Return the Hello of a process of this release."""
    return Hello(
        protocol_version=PROTOCOL_VERSION, id=member_id, role=role, fingerprint=fingerprint
    )


HELLO_START = bytes(encode(hello("", ""))[0][:12])
"""The first bytes of its header: the number of its fields, and its type."""
