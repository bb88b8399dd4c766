"""The stage timings that travel with a request, checked where they enter a process."""

from typing import TypedDict

import msgspec

from common.messages import Name, Seconds
from common.wire import Tensor

MAX_TIMINGS_BYTES = 64 * 1024
"""The timings of 128 items take two thirds of it, if the names of replicas are the longest."""


class ItemTimings(TypedDict, total=False):
    """What the stages took for one item: the proto message ImageTimings."""

    preprocess_seconds: Seconds
    queue_seconds: Seconds
    encode_seconds: Seconds
    cached: bool
    replica: Name


class Timings(TypedDict, total=False):
    """What the stages took for a request: the proto message Timings."""

    preprocess_seconds: Seconds
    images: list[ItemTimings]
    queue_seconds: Seconds
    prefill_seconds: Seconds
    decode_seconds: Seconds
    time_to_first_token_seconds: Seconds
    total_seconds: Seconds


decoder = msgspec.json.Decoder(Timings)
encoder = msgspec.json.Encoder()


def read_timings(tensor: Tensor) -> Timings:
    """Return the timings that a message carries. Names that Timings does not have are left out.

    Raises
    ------
    ValueError
        if they are anything but a small JSON object of such timings.
    """
    if tensor.dtype != "uint8" or len(tensor.shape) != 1 or tensor.nbytes > MAX_TIMINGS_BYTES:
        raise ValueError(
            f"timings is {tensor}, at most {MAX_TIMINGS_BYTES} bytes of JSON are meant"
        )
    try:
        return decoder.decode(tensor.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError("timings is not a JSON object of timings") from e


def write_timings(timings: Timings) -> bytes:
    """UTF-8 JSON of the timings."""
    return encoder.encode(timings)
