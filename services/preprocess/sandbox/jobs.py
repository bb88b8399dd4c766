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
import weakref
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np

from common.messages import ItemKind
from common.pixel_bounds import PixelBounds
from common.wire import Buffer
from services.preprocess.image_formats import READABLE
from services.preprocess.videos import DEFAULT_FPS, DEFAULT_MAX_FRAMES, VideoForm

MAX_MESSAGE_BYTES = 128 * 1024
MAX_FAULT_CHARS = 2000
SPARE_BYTES = 4 * 2**20
MAX_SPARES = 16
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
    known_as: str = ""
    video_fps: float = DEFAULT_FPS
    max_frames: int = DEFAULT_MAX_FRAMES
    image_formats: tuple[str, ...] = READABLE


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The model's files are loaded. If `fault` is not empty, it says why they cannot be."""

    fault: str = ""


# Jobs


class Read(msgspec.Struct, tag=True, frozen=True):
    """Tokenize a prompt and its bad words, check its guide, and read the headers of its items.

    If there is room for the items, and preparing them takes little time, they are prepared, too.
    Blobs: the prompt, its chat options, the guide, the bad words (empty for none), the file of each
    item.
    """

    prompt_kind: str
    guide_kind: str
    kinds: tuple[ItemKind, ...]
    max_patches: int
    """The most patches that an item may have; 0 for no limit."""
    has_room: bool
    forms: dict[int, VideoForm] = {}
    """The forms of the videos, by the index of the item."""
    bounds: dict[int, PixelBounds] = {}
    """The bounds that the client sets to the items, by the index of the item."""
    guide_whitespace: str = ""


class Prepare(msgspec.Struct, tag=True, frozen=True):
    """Prepare some items of a request. Blobs: the file of each item."""

    first: int
    """The index of the first item in its request."""
    kinds: tuple[ItemKind, ...]
    max_patches: int
    forms: dict[int, VideoForm] = {}
    """The forms of the videos, by the index of the item."""
    bounds: dict[int, PixelBounds] = {}
    """The bounds that the client sets to the items, by the index of the item."""


class Spell(msgspec.Struct, tag=True, frozen=True):
    """Name tokens, or tell their text. Blobs: the token ids as int64."""

    names: bool
    """Whether each token is named."""


Job = Read | Prepare | Spell


# Results


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
    step_seconds: float = 0.0


class ReadDone(msgspec.Struct, tag=True, frozen=True):
    """Blobs: the token ids as int64, the grammar as UTF-8, the token sequences of the bad words as
    JSON, the patches of each prepared item."""

    sizes: tuple[tuple[int, int], ...]
    """Height and width of each item, by its header."""
    num_images: tuple[int, ...]
    """How many images of its size each item costs."""
    num_tokens: tuple[int, ...]
    """The tokens that each item will become."""
    items: tuple[PreparedFacts, ...] = ()
    """All items if they were prepared, else none."""


class Prepared(msgspec.Struct, tag=True, frozen=True):
    """Blobs: the patches of each item, uint8 [num_patches, values per patch]."""

    items: tuple[PreparedFacts, ...]


class Spelled(msgspec.Struct, tag=True, frozen=True):
    """Blobs: the names of the tokens as a JSON list, or their text as UTF-8."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The request fails; `code` names a class of common.errors."""

    code: str
    message: str
    item: int | None = None


Result = ReadDone | Prepared | Spelled | Refused


class JobMessage(msgspec.Struct, frozen=True):
    job: Job
    blob_sizes: tuple[int, ...] = ()


class ResultMessage(msgspec.Struct, frozen=True):
    result: Result
    blob_sizes: tuple[int, ...] = ()
    in_spare: bool = False
    """Whether the blobs are in the memory that came with the job."""


def send_job(connection: socket.socket, job: Job, blobs: Sequence[Buffer], spare: int) -> None:
    """Send a job with its blobs, and memory for its result (a descriptor, or -1).

    Raises OSError if the other end or a resource is missing.
    """
    memory = new_memory(blobs)
    try:
        data = msgspec.msgpack.encode(JobMessage(job, tuple(map(len, blobs))))
        socket.send_fds(connection, [data], [memory, spare] if spare >= 0 else [memory])
    finally:
        os.close(memory)


def send_result(
    connection: socket.socket, result: Result, blobs: Sequence[Buffer], spare: int = -1
) -> None:
    """Send a result with its blobs, in the spare memory if that came with the job and suffices."""
    sizes = tuple(map(len, blobs))
    in_spare = spare >= 0 and sum(sizes) <= SPARE_BYTES
    memory = spare if in_spare else new_memory(blobs)
    if in_spare:
        os.lseek(spare, 0, os.SEEK_SET)
        write_all(spare, blobs)
    data = msgspec.msgpack.encode(ResultMessage(result, sizes, in_spare))
    socket.send_fds(connection, [data], [] if in_spare else [memory])
    for descriptor in {memory, spare} - {-1}:
        os.close(descriptor)


def new_memory(blobs: Sequence[Buffer]) -> int:
    """Return a descriptor of anonymous memory with these bytes."""
    memory = os.memfd_create("twinlens", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write_all(memory, blobs)
    except OSError:
        os.close(memory)
        raise
    return memory


def write_all(descriptor: int, blobs: Sequence[Buffer]) -> None:
    for blob in blobs:
        view = memoryview(blob)
        while len(view):
            view = view[os.write(descriptor, view) :]


def receive(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """Return a message and its descriptors, or None if the other end is gone."""
    try:
        data, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 2)
    except OSError:
        return None
    return (data, descriptors) if data else None


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
    return split(whole, sizes)


def split(whole: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Return the blobs of these sizes that stand in memory one after the other."""
    blobs = []
    start = 0
    for size in sizes:
        blobs.append(whole[start : start + size])
        start += size
    return blobs


class Spare:
    """Memory of SPARE_BYTES for a result."""

    __slots__ = ("descriptor", "whole")

    def __init__(self, descriptor: int, memory: mmap.mmap) -> None:
        self.descriptor = descriptor
        self.whole = np.frombuffer(memory, np.uint8)
        """The memory is free once nothing refers to this array any more."""


class Spares:
    """Memory for results, which is used again: the kernel takes long to provide new pages."""

    def __init__(self) -> None:
        self._free: list[tuple[int, mmap.mmap]] = []
        self._num_made = 0

    def take(self) -> Spare | None:
        """Return some memory, or None if enough of it is in use."""
        if not self._free and self._num_made < MAX_SPARES:
            self._free.append(self._make())
            self._num_made += 1
        if not self._free:
            return None
        descriptor, memory = self._free.pop()
        spare = Spare(descriptor, memory)
        weakref.finalize(spare.whole, self._free.append, (descriptor, memory))
        return spare

    def _make(self) -> tuple[int, mmap.mmap]:
        descriptor = os.memfd_create("twinlens-spare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, SPARE_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return descriptor, mmap.mmap(descriptor, SPARE_BYTES, prot=mmap.PROT_READ)
