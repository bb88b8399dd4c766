"""The messages between preprocess and its sandboxes, and the memory that passes bytes to them.

Both ends run the same version, so a message needs no version. A message is one datagram. The bytes
that belong to it (*blobs*) are in anonymous memory, whose descriptor goes with the datagram. So
pixels are neither copied into a socket nor out of it.
"""

import contextlib
import fcntl
import mmap
import os
import socket
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from common.messages import ItemKind
from common.wire import Buffer

MAX_MESSAGE_BYTES = 128 * 1024
MAX_FAULT_CHARS = 2000
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
T = TypeVar("T")


class BadAnswer(ValueError):
    """A sandbox sent something that is not an answer to its job."""


class Setup(msgspec.Struct, frozen=True):
    """What a sandbox must know of the deployment."""

    model: str
    max_model_len: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    resizes_oversized: bool = True


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The model's files are loaded. If `fault` is not empty, it says why they cannot be."""

    fault: str = ""


# Jobs


class Read(msgspec.Struct, tag=True, frozen=True):
    """Tokenize a prompt, check its guide, and read the headers of its items.

    Blobs: the prompt, the guide, the file of each item.
    """

    prompt_kind: str
    guide_kind: str
    kinds: tuple[ItemKind, ...]
    max_patches: int
    """The most patches that an item may have; 0 for no limit."""


class Prepare(msgspec.Struct, tag=True, frozen=True):
    """Prepare some items of a request. Blobs: the file of each item."""

    first: int
    """The index of the first item in its request."""
    kinds: tuple[ItemKind, ...]
    max_patches: int


Job = Read | Prepare


# Results


class ReadDone(msgspec.Struct, tag=True, frozen=True):
    """Blobs: the token ids as int64, and the grammar as UTF-8."""

    sizes: tuple[tuple[int, int], ...]
    """Height and width of each item, by its header."""
    num_tokens: tuple[int, ...]
    """The tokens that each item will become."""


class PreparedFacts(msgspec.Struct, frozen=True):
    """A prepared item without its patches."""

    kind: ItemKind
    mm_hash: str
    grid_thw: tuple[int, int, int]
    content_size: tuple[int, int]
    num_patches: int
    num_tokens: int
    seconds: float
    """How long its preparation took."""


class Prepared(msgspec.Struct, tag=True, frozen=True):
    """Blobs: the patches of each item, uint8 [num_patches, values per patch]."""

    items: tuple[PreparedFacts, ...]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The request fails; `code` names a class of common.errors."""

    code: str
    message: str
    item: int | None = None


Result = ReadDone | Prepared | Refused


class JobMessage(msgspec.Struct, frozen=True):
    job: Job
    blob_sizes: tuple[int, ...] = ()


class ResultMessage(msgspec.Struct, frozen=True):
    result: Result
    blob_sizes: tuple[int, ...] = ()


def send(
    connection: socket.socket, message: JobMessage | ResultMessage, blobs: Sequence[Buffer]
) -> None:
    """Send a message with its blobs. Raises OSError if the other end or a resource is missing."""
    memory = os.memfd_create("twinlens", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for blob in blobs:
            write_all(memory, blob)
        data = msgspec.msgpack.encode(message)
        assert len(data) <= MAX_MESSAGE_BYTES, f"a message of {len(data)} bytes"
        socket.send_fds(connection, [data], [memory])
    finally:
        os.close(memory)


def write_all(descriptor: int, blob: Buffer) -> None:
    view = memoryview(blob).cast("B") if len(blob) else memoryview(b"")
    while view:
        view = view[os.write(descriptor, view) :]


def receive(connection: socket.socket) -> tuple[bytes, int] | None:
    """Return a message and the descriptor of its blobs, or None if the other end is gone."""
    try:
        data, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
    except OSError:
        return None
    if not data:
        return None
    return data, descriptors[0] if descriptors else -1


def unpack(data: bytes, kind: type[T]) -> T:
    """Return the message of this type that was received.

    Raises
    ------
    BadAnswer
        if it is not one.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BadAnswer("not a message of this type") from e


def map_blobs(descriptor: int, sizes: Sequence[int]) -> list[memoryview]:
    """Return the blobs that came with a message, and close the descriptor.

    The memory is freed with the last view of it. It is sealed first: if the sender could still
    shrink it, reading it would end this process.

    Raises
    ------
    BadAnswer
        if the memory is not of these sizes.
    """
    try:
        total = sum(sizes)
        if descriptor < 0 or min(sizes, default=0) < 0:
            raise BadAnswer("the blobs are missing")
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        if os.fstat(descriptor).st_size != total:
            raise BadAnswer("the blobs have another size")
        whole = memoryview(mmap.mmap(descriptor, total, prot=mmap.PROT_READ) if total else b"")
    except OSError as e:
        raise BadAnswer(f"the blobs cannot be mapped: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    blobs = []
    start = 0
    for size in sizes:
        blobs.append(whole[start : start + size])
        start += size
    return blobs
