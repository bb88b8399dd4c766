"""Counts the values of a JSON body and measures its depth before objects are built from it.

The text is looked at in pieces, and each piece by a few calls that run in C. So a body of tens of
megabytes takes well under a second, and no call keeps other threads from running for long.
"""

import numpy as np
import numpy.typing as npt

from common.errors import InvalidRequest
from services.gateway.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES

PIECE_BYTES = 64 * 1024


def kinds_of_bytes() -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
    """Return, for each byte outside strings, what it adds to the depth and whether it is part of a
    number or a literal."""
    steps = np.zeros(256, np.int8)
    steps[list(b"[{")] = 1
    steps[list(b"]}")] = -1
    is_scalar = np.ones(256, np.bool_)
    is_scalar[list(b'[]{},:" \t\r\n')] = False
    return steps, is_scalar


STEPS, IS_SCALAR = kinds_of_bytes()


class JsonBounds:
    """Reads the pieces of a body in order, and raises InvalidRequest once one exceeds a bound.

    The text need not be valid JSON. Up to its first error, no value is missed.
    """

    def __init__(self) -> None:
        self.num_values = 0
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        """Whether the last piece ended with the backslash of an escaped character."""
        self._is_in_scalar = False

    def read(self, piece: bytes) -> None:
        """Count the values that begin in this piece, and check the bounds.

        Raises
        ------
        InvalidRequest
            if a bound is exceeded.
        """
        if self._is_escaped:
            piece = piece[1:]
            self._is_escaped = False
        if b"\\" in piece:
            piece = piece.replace(rb"\\", b"").replace(rb"\"", b"")
            self._is_escaped = piece.endswith(b"\\")
        if self._is_in_string and b'"' not in piece:
            return
        parts = piece.split(b'"')
        outside = parts[1::2] if self._is_in_string else parts[::2]
        num_quotes = len(parts) - 1
        # Each string and each key has two quotes. The second one belongs to the string of before.
        self.num_values += (num_quotes + (not self._is_in_string)) // 2
        self._is_in_string ^= bool(num_quotes % 2)
        self._read_outside(b'"'.join(outside))

    def _read_outside(self, text: bytes) -> None:
        """Count the values in the text outside strings, for which quotes stand."""
        if not text:
            return
        codes = np.frombuffer(text, np.uint8)
        depths = np.cumsum(STEPS[codes], dtype=np.int64)
        scalars = IS_SCALAR[codes]
        begins = np.count_nonzero(scalars[1:] > scalars[:-1])
        begins += bool(scalars[0]) and not self._is_in_scalar
        containers = text.count(b"[") + text.count(b"{")
        self.num_values += int(begins) + containers - text.count(b":")
        deepest = self._depth + int(depths.max())
        self._depth += int(depths[-1])
        self._is_in_scalar = bool(scalars[-1]) and not self._is_in_string
        check_bounds(self.num_values, deepest)


def check_bounds(num_values: int, depth: int) -> None:
    if num_values > MAX_JSON_VALUES:
        raise InvalidRequest(
            f"the body has more than {MAX_JSON_VALUES} JSON values; send fewer", stage="gateway"
        )
    if depth > MAX_JSON_DEPTH:
        raise InvalidRequest(
            f"the body has more than {MAX_JSON_DEPTH} objects and arrays inside each other; nest "
            "fewer",
            stage="gateway",
        )


def check_json(body: bytes | bytearray) -> None:
    """Raise InvalidRequest if the body has too many JSON values, or nests them too deeply."""
    containers = body.count(b"[") + body.count(b"{")
    if len(body) <= MAX_JSON_VALUES and containers <= MAX_JSON_DEPTH:
        return
    bounds = JsonBounds()
    text = memoryview(body)
    for start in range(0, len(text), PIECE_BYTES):
        bounds.read(bytes(text[start : start + PIECE_BYTES]))
