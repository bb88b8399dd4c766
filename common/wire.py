"""Two pure functions that turn typed messages into ZeroMQ frames and back.

    frames = [header, tensor 0, tensor 1, ...]

The header is msgpack, at most 64 KiB. A tensor appears in it as [frame index, dtype, shape]. Its
bytes are the frame, neither copied nor escaped.

Decoding trusts nothing. Every limit is explicit, each tensor's size is checked against its dtype
and shape, and each frame must be used exactly once. Everything else is a WireError. No container is
made that is longer than the header that describes it.
"""

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import msgspec
import numpy as np

MAX_HEADER_BYTES = 64 * 1024
MAX_FRAMES = 1 + 160
MAX_TENSOR_BYTES = 512 * 2**20
MAX_DIMENSIONS = 8
MAX_ERROR_CHARS = 200

# numpy has no bfloat16, so its elements are viewed as the uint16 that store them.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
}

# dtype.name takes longer than the rest of what Tensor.of does.
NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items() if name != "bfloat16"}

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class WireError(ValueError):
    """The frames are not a message of the expected type."""


class Tensor:
    """A tensor as it is sent: dtype name, shape, and its elements in row-major order."""

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """Return a view of the array, or of a copy if it is not contiguous.

        numpy has no bfloat16: call the constructor with the dtype's name for it.
        """
        array = np.asarray(array, order="C")  # ascontiguousarray would make 0-d arrays 1-d
        name = NAMES.get(array.dtype)
        assert name is not None, f"no wire form for {array.dtype.str}"
        # Not array.data.cast("B"): a memoryview refuses to cast a shape that contains zero.
        return cls(name, array.shape, array.reshape(-1).view(np.uint8).data)

    @classmethod
    def of_bytes(cls, data: Buffer) -> "Tensor":
        return cls("uint8", (len(data),), data)

    @classmethod
    def of_int64(cls, values: Sequence[int]) -> "Tensor":
        return cls.of(np.array(values, np.int64))

    @classmethod
    def of_text(cls, text: str) -> "Tensor":
        return cls.of_bytes(text.encode())

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def numpy(self) -> np.ndarray:
        """Return a read-only view; bfloat16 is viewed as uint16."""
        return np.frombuffer(self.data, NUMPY_DTYPES[self.dtype]).reshape(self.shape)

    def bytes(self) -> bytes:
        return bytes(self.data)

    def text(self) -> str:
        return bytes(self.data).decode()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tensor)
            and (self.dtype, self.shape) == (other.dtype, other.shape)
            and bytes(self.data) == bytes(other.data)
        )

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape})"


def encode(message: msgspec.Struct) -> list[Buffer]:
    """Return the frames of a message.

    Tensor frames are views, so the arrays must not change before they are sent.
    """
    frames: list[Buffer] = [b""]

    def hook(value: Any) -> Any:
        assert isinstance(value, Tensor), f"no wire form for {type(value)}"
        frames.append(value.data)
        return [len(frames) - 1, value.dtype, value.shape]

    frames[0] = msgspec.msgpack.encode(message, enc_hook=hook)
    assert len(frames[0]) <= MAX_HEADER_BYTES, (
        f"a header of {len(frames[0])} bytes: what grows belongs into a tensor"
    )
    assert len(frames) <= MAX_FRAMES, f"{len(frames)} frames"
    return frames


@overload
def decode(frames: list[Buffer], union: type[T]) -> T: ...


@overload
def decode(frames: list[Buffer], union: object) -> Any: ...


def decode(frames: list[Buffer], union: Any) -> Any:
    """Return the message that these frames encode, which must be a member of `union`.

    Raises
    ------
    WireError
        if they encode anything else. Time and memory are bounded for any input.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"{len(frames)} frames")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError(
            f"a header of {len(frames[0])} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    reading.frames = frames
    reading.unused = set(range(1, len(frames)))
    try:
        message = decoder_of(union).decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        # The error may quote the input, and it goes into logs and Goodbyes.
        raise WireError(str(e)[:MAX_ERROR_CHARS]) from e
    finally:
        reading.frames = []
    if reading.unused:
        raise WireError(f"{len(reading.unused)} frames are not used")
    return message


class Reading(threading.local):
    """The frames that this thread is decoding.

    A decoder's hook cannot be given them, and making a decoder per message takes longer than
    decoding.
    """

    frames: list[Buffer]
    unused: set[int]


reading = Reading()


@functools.cache
def decoder_of(union: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(union, dec_hook=decode_tensor)


def decode_tensor(expected: type, value: Any) -> Tensor:
    """Return the tensor that a header describes, and mark its frame as used."""
    assert expected is Tensor
    tensor, index = read_tensor(value, reading.frames)
    if index not in reading.unused:
        raise WireError(f"frame {index} is used twice")
    reading.unused.remove(index)
    return tensor


def read_tensor(value: Any, frames: list[Buffer]) -> tuple[Tensor, int]:
    """Return a tensor and the index of its frame, after checking both."""
    match value:
        case [index, str(dtype), [*shape]] if all(type(n) is int for n in (index, *shape)):
            pass
        case _:
            raise WireError("a tensor is not [frame, dtype, shape]")
    if not 1 <= index < len(frames):
        raise WireError(f"no frame {index}")
    if dtype not in NUMPY_DTYPES:
        raise WireError(f"dtype {dtype[:20]!r} is not one of {', '.join(NUMPY_DTYPES)}")
    if len(shape) > MAX_DIMENSIONS or any(n < 0 for n in shape):
        raise WireError("a shape has too many or negative dimensions")
    data = frames[index]
    size = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if size != len(data) or size > MAX_TENSOR_BYTES:
        raise WireError(f"{len(data)} bytes for {dtype} {shape}")
    return Tensor(dtype, tuple(shape), data), index
