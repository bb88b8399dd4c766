"""What became of a request that was sent again."""

from dataclasses import dataclass, field

import numpy as np

from common.recording import Exchange


@dataclass(slots=True)
class Outcome:
    """What became of a request that was sent again. Times are seconds after it was sent."""

    finish_reason: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """Empty if the server does not return them."""
    values: list[float] = field(default_factory=list)
    """The probabilities or the embedding that a request for no text asks for."""
    error: str = ""
    """Why it failed; empty if it was answered."""
    seconds: float = 0.0
    first_token_seconds: float | None = None
    num_tokens: int = 0
    lag: float = 0.0
    """How much later it was sent than the pace asks for, in seconds."""


def floats(data: bytes) -> list[float]:
    """Return the numbers of little-endian float32 bytes; a part of one at the end is dropped."""
    return np.frombuffer(data[: len(data) // 4 * 4], "<f4").tolist()


@dataclass(frozen=True, slots=True)
class Replayed:
    """A recorded exchange, and its outcome now; None if it was not sent."""

    exchange: Exchange
    outcome: Outcome | None
