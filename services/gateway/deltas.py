"""What is read of a Delta, checked where it enters the gateway."""

from typing import Any, TypedDict

import msgspec

from common.messages import Delta
from common.timings import Timings, read_timings
from common.wire import Tensor
from services.gateway.generation import Piece

FINISH_REASONS = ("", "stop", "length")
TOKEN_ID_END = 2**31


class TokenEntry(TypedDict):
    """What the detokenizer says of one token, with the names of OpenAI's interface."""

    token: str
    logprob: float
    bytes: list[int]
    token_id: int


class Entry(TokenEntry):
    """An entry of OpenAI's `logprobs.content`."""

    top_logprobs: list[TokenEntry]


entries_decoder = msgspec.json.Decoder(list[Entry])


def read_delta(delta: Delta) -> tuple[Piece, Timings | None]:
    """Return the new tokens of an answer with their text, and the timings if the answer ends.

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
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as e:
        raise ValueError("the text or its log-probabilities cannot be read") from e
    if logprobs and len(logprobs) != len(ids):
        raise ValueError(f"{len(logprobs)} log-probabilities came for {len(ids)} tokens")
    timings = None
    if delta.finish_reason:
        if delta.timings is None:
            raise ValueError("the end of the answer has no timings")
        timings = read_timings(delta.timings)
    return Piece(delta.offset, ids, text, logprobs), timings


def read_token_ids(tensor: Tensor) -> list[int]:
    """Return token ids. Raises ValueError unless the tensor holds them."""
    if tensor.dtype != "int64" or len(tensor.shape) != 1:
        raise ValueError(f"the token ids are {tensor}, int64 [n] is wanted")
    ids = tensor.numpy()
    if ids.size and not 0 <= ids.min() <= ids.max() < TOKEN_ID_END:
        raise ValueError(f"a token id is outside [0, {TOKEN_ID_END})")
    return ids.tolist()
