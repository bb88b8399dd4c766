"""The first message on every connection."""

from common.messages import PROTOCOL_VERSION, Hello
from common.wire import Buffer, WireError, decode, encode


def is_hello(frames: list[Buffer]) -> bool:
    """A peer that connects anew under its old id begins with Hello; nothing else is as short and
    decodes as one."""
    if len(frames) > 1 or bytes(frames[0][: len(HELLO_START)]) != HELLO_START:
        return False
    try:
        return isinstance(decode(frames, Hello), Hello)
    except WireError:
        return False


def hello(member_id: str, role: str, fingerprint: str = "") -> Hello:
    return Hello(
        protocol_version=PROTOCOL_VERSION, id=member_id, role=role, fingerprint=fingerprint
    )


HELLO_START = bytes(encode(hello("", ""))[0][:12])
"""How its header begins: with the number of its fields, and its type."""
