"""Reads server-sent events as any server may write them."""

import re

LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """Turns the bytes of a stream into the data of its events.

    Lines may end with LF, CRLF or CR, and may be split anywhere between two reads. Comments, and
    fields other than `data`, are dropped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of each event that these bytes complete, lines joined with LF."""
        buffered = self._rest + received
        # A CR at the end may be the first half of a CRLF.
        held_back = buffered[len(buffered) - 1 :] if buffered.endswith(b"\r") else b""
        *lines, rest = LINE_END.split(buffered[: len(buffered) - len(held_back)])
        self._rest = rest + held_back
        return [event for line in lines if (event := self._take_line(line))]

    def close(self) -> list[bytes]:
        """Return the data of an event that the end of the stream cut off before its empty line."""
        return self.feed(b"\n\n")

    def _take_line(self, line: bytes) -> bytes:
        """Return the data of the event that this line ends, or nothing."""
        if not line:
            event = b"\n".join(self._data)
            self._data = []
            return event
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return b""
