"""What is read of a Delta, checked where it enters the gateway."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NotRequired, TypedDict

import msgspec

from common.boxes import read_boxes
from common.messages import Delta
from common.timings import Timings, read_timings
from common.wire import Tensor
from services.gateway.generation import Boxes, Piece

FINISH_REASONS = ("", "stop", "length", "repetition", "tool_calls")
TOKEN_ID_END = 2**31
MAX_SIDE = 2**31 - 1
"""The longest side of an item in pixels, so that coordinates fit into the API's numbers."""


class TokenEntry(TypedDict):
    """What the detokenizer says of one token, with the names of OpenAI's interface."""

    token: str
    logprob: float
    bytes: list[int]
    token_id: int


class Entry(TokenEntry):
    """An entry of OpenAI's `logprobs.content`."""

    top_logprobs: list[TokenEntry]


class CallPart(TypedDict):
    """A part of a tool call, as `Piece.tool_calls` has it, and text that follows it."""

    index: int
    arguments: str
    id: NotRequired[str]
    name: NotRequired[str]
    withdrawn: NotRequired[bool]
    text: NotRequired[str]


entries_decoder = msgspec.json.Decoder(list[Entry])
parts_decoder = msgspec.json.Decoder(list[CallPart])


def read_delta(delta: Delta, choice: int = 0) -> tuple[Piece, Timings]:
    """Return the new tokens of an answer with their text, and the timings that came with them.

    `choice` is the index of the answer among those to its request. The piece is to be delivered
    `in_order`.

    Raises
    ------
    ValueError
        if the delta is malformed.
    """
    if delta.finish_reason not in FINISH_REASONS:
        raise ValueError(f"there is no finish reason {delta.finish_reason!r}")
    ids = read_token_ids(delta.token_ids)
    try:
        text = delta.text.text()
        logprobs: Any = entries_decoder.decode(delta.logprobs.data) if delta.logprobs else []
        calls: Any = parts_decoder.decode(delta.tool_calls.data) if delta.tool_calls else ()
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as e:
        problem = "the text, its log-probabilities or its tool calls cannot be read"
        raise ValueError(problem) from e
    if logprobs and len(logprobs) != len(ids):
        raise ValueError(f"{len(logprobs)} log-probabilities came for {len(ids)} tokens")
    if any(("id" in part) != ("name" in part) for part in calls):
        raise ValueError("the first part of a call has an id and a name")
    if delta.finish_reason and delta.timings is None:
        raise ValueError("the end of the answer has no timings")
    timings: Timings = read_timings(delta.timings) if delta.timings else {}
    return Piece(delta.offset, ids, text, logprobs, calls, choice), timings


def in_order(piece: Piece) -> Iterator[Piece]:
    """Yield a piece as pieces whose text stands before their calls, in the order of the answer."""
    calls: list[dict[str, Any]] = []
    for part in piece.tool_calls:
        calls.append({name: value for name, value in part.items() if name != "text"})
        if text := part.get("text"):
            yield replace(piece, tool_calls=calls)
            end = piece.offset + len(piece.token_ids)
            piece = replace(piece, offset=end, token_ids=[], text=text, logprobs=[])
            calls = []
    yield replace(piece, tool_calls=calls) if piece.tool_calls else piece


def read_delta_boxes(delta: Delta, item_sizes: list[tuple[int, int]]) -> Boxes | None:
    """Return the boxes of an answer in pixels; None if the model's answers mark none.

    They lie on the latest image. `item_sizes` has the (height, width) of each image.

    Raises
    ------
    ValueError
        if they are malformed.
    """
    if delta.boxes is None:
        return None
    boxes = read_boxes(delta.boxes)
    if not item_sizes:
        return Boxes(0, [])
    height, width = item_sizes[-1]
    return Boxes(len(item_sizes) - 1, [box.scaled(height, width) for box in boxes])


def read_item_sizes(tensor: Tensor | None, num_items: int) -> list[tuple[int, int]]:
    """Return (height, width) of each item. Raises ValueError unless the tensor holds them."""
    if tensor is None:
        return []
    if tensor.dtype != "int64" or tensor.shape != (num_items, 2):
        raise ValueError(f"the sizes are {tensor}, int64 {(num_items, 2)} is wanted")
    sizes = tensor.numpy()
    if sizes.size and not 0 < sizes.min() <= sizes.max() <= MAX_SIDE:
        raise ValueError(f"a side of an item is outside [1, {MAX_SIDE}]")
    return [(height, width) for height, width in sizes.tolist()]


def read_token_ids(tensor: Tensor) -> list[int]:
    """Return token ids. Raises ValueError unless the tensor holds them."""
    if tensor.dtype != "int64" or len(tensor.shape) != 1:
        raise ValueError(f"the token ids are {tensor}, int64 [n] is wanted")
    ids = tensor.numpy()
    if ids.size and not 0 <= ids.min() <= ids.max() < TOKEN_ID_END:
        raise ValueError(f"a token id is outside [0, {TOKEN_ID_END})")
    return ids.tolist()
