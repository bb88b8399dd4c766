"""A recording of the requests that a gateway admitted, and how each of them ended.

A recording is a file of msgpack values, one after the other. Each value is a byte string that holds
one record, which is msgpack as well. So a reader knows the length of a record before it decodes it,
and a record that was cut off, because the writer was killed, is noticed by its length.

The records of one run of a gateway are `Started`, then any number of the others. A gateway that
starts again appends another run. A file of the clients, for example an image, is stored once in a
run, before the first request that refers to it by its hash.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec

from common.messages import (
    MAX_CHOICES,
    MAX_FRAMES,
    Fps,
    GuideKind,
    ItemKind,
    Priority,
    Sampling,
    Stopping,
    Task,
    Usage,
)
from common.wire import Buffer

FORMAT = "twinlens-recording"
VERSION = 1
PREFIX = struct.Struct(">BI")
"""What stands before a record: msgpack's mark of a byte string, and its length in bytes."""
MARK = 0xC6
MAX_RECORD_BYTES = 2**31
MAX_STARTED_BYTES = 2**16
MAX_ITEMS = 32
NOT_ONE = "it is not a recording: give a file that `twinlens serve --record` wrote"

Hash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
PromptKind = Annotated[str, msgspec.Meta(pattern=r"^(messages|text|token_ids)\Z")]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class BadRecording(ValueError):
    """A file is not a recording, or cannot be read as one. The message says why."""


class Started(msgspec.Struct, tag="started", kw_only=True, frozen=True):
    """The first record of a run."""

    format: str = FORMAT
    version: int = VERSION
    twinlens: str
    """The version of Twinlens."""
    model: str
    """The name of the model for clients."""
    time: Seconds
    """When the run began, in seconds since 1970."""


class File(msgspec.Struct, tag="file", kw_only=True, frozen=True):
    """A file that requests brought: an image, a video, or all frames of a video."""

    hash: Hash
    """SHA-256 of the bytes."""
    data: bytes


class RecordedItem(msgspec.Struct, kw_only=True, frozen=True):
    """An image or a video of a request; its bytes are in the `File` with this hash."""

    kind: ItemKind = "image"
    hash: Hash
    frame_lengths: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_FRAMES)] = ()
    """The bytes of each frame of a video that came as images; empty for a file."""
    fps: Fps | None = None
    min_pixels: Number | None = None
    """The fewest pixels that the client wanted the resized item to have."""
    max_pixels: Number | None = None
    """The most pixels that the client wanted the resized item to have."""


class RecordedRules(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The `TokenRules` of a request, in the words of the API."""

    logit_bias: dict[str, float] = {}
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] = []
    no_repeat_ngram_size: int = 0


class Asked(msgspec.Struct, tag="request", kw_only=True, frozen=True, omit_defaults=True):
    """One admitted request."""

    number: Number
    """Names the request within its run."""
    request_id: str
    """The id of the request in the logs."""
    arrival: Seconds
    """Seconds from the begin of the run."""
    api: Literal["http", "grpc"] = "http"
    task: Task = "generate"
    prompt_kind: PromptKind
    prompt: bytes
    """As in GenerationRequest: UTF-8 JSON of messages, UTF-8 text, or little-endian int64 ids."""
    items: Annotated[tuple[RecordedItem, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()
    sampling: Sampling = Sampling()
    """Its seed is the one in effect, which the gateway draws if the client sends none."""
    stopping: Stopping = Stopping()
    guide_kind: GuideKind = ""
    guide: str = ""
    guide_whitespace: str = ""
    rules: RecordedRules | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] = 1
    priority: Priority = 0
    timeout: Seconds | None = None
    """Seconds until the deadline; None if the client set none."""
    chat_options: bytes = b""
    """As in GenerationRequest."""
    adapter: str = ""
    """As in GenerationRequest."""


class Answered(msgspec.Struct, tag="end", kw_only=True, frozen=True, omit_defaults=True):
    """How a request ended."""

    number: Number
    outcome: str
    """A finish reason, `pooled`, `aborted`, or the code of an error."""
    error: str = ""
    error_stage: str = ""
    seconds: Seconds
    """Seconds from the arrival to the end."""
    first_token_seconds: Seconds | None = None
    """Seconds from the arrival to the first token; None if there was none."""
    token_ids: list[TokenId] = []
    text: str = ""
    """The text with the arguments of tool calls. Token ids and text are those of the first answer,
    if there are several."""
    values: bytes = b""
    """float32 [n], little-endian: the result of a request for no text."""
    usage: Usage = Usage()
    timings: dict[str, Any] = {}
    """The stage timings of the answer."""


Record = Started | File | Asked | Answered
decoder = msgspec.msgpack.Decoder(Record)


def frame(record: Record) -> list[Buffer]:
    """Return the bytes of a record as they stand in the file, in two parts."""
    body = msgspec.msgpack.encode(record)
    return [PREFIX.pack(MARK, len(body)), body]


def file_hash(data: Buffer) -> str:
    return hashlib.sha256(data).hexdigest()


def frames_in(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the offset and the length of each whole record, and stop before one that was cut off.

    Raises
    ------
    BadRecording
        if the file does not begin as a recording, or if something else than a record stands in it.
    """
    size = os.fstat(file.fileno()).st_size
    offset = 0
    most = MAX_STARTED_BYTES
    while offset + PREFIX.size <= size:
        file.seek(offset)
        mark, length = PREFIX.unpack(file.read(PREFIX.size))
        if mark != MARK or length > most:
            raise BadRecording(f"no record begins at byte {offset}" if offset else NOT_ONE)
        offset += PREFIX.size
        if offset + length > size:
            return
        if most == MAX_STARTED_BYTES:
            check_started(file.read(length))
            most = MAX_RECORD_BYTES
        yield offset, length
        offset += length


def check_started(body: bytes) -> None:
    """Raise BadRecording unless this is the first record of a recording of this version."""
    try:
        started = msgspec.msgpack.decode(body, type=Started)
    except (msgspec.DecodeError, RecursionError):
        started = None
    if started is None or started.format != FORMAT:
        raise BadRecording(NOT_ONE)
    if started.version != VERSION:
        raise BadRecording(
            f"it is a recording of version {started.version} and this Twinlens reads version "
            f"{VERSION}: use the Twinlens that wrote it"
        )


def decode(body: bytes) -> Record:
    """Return the record, or raise BadRecording if the bytes are not one."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRecording(
            f"a record cannot be read ({error}): the file is damaged, or another version of "
            "Twinlens wrote it"
        ) from None


@dataclass(slots=True)
class Exchange:
    """A request and how it ended; None if the recording ends before the request did."""

    asked: Asked
    arrival: float
    """Seconds from the first arrival in the file. Between two runs no time passes."""
    answered: Answered | None = None


@dataclass(slots=True)
class Recording:
    """The requests of a file in the order of their arrival. The clients' files stay on the disk."""

    path: Path
    runs: list[Started] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    is_cut_off: bool = False
    """Whether the last record was incomplete."""
    _files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and length of the record of each file, by its hash."""

    @property
    def num_files(self) -> int:
        return len(self._files)

    def read_file(self, hash: str) -> bytes:
        """Return the bytes of a file that a request refers to.

        Raises
        ------
        BadRecording
            if the recording does not have it, or has other bytes in its place.
        """
        if hash not in self._files:
            raise BadRecording(f"{self.path} lacks the file {hash[:12]} that a request refers to")
        offset, length = self._files[hash]
        with self.path.open("rb") as file:
            file.seek(offset)
            record = decode(file.read(length))
        if not isinstance(record, File) or file_hash(record.data) != hash:
            raise BadRecording(f"the file {hash[:12]} in {self.path} is damaged")
        return record.data


def read_recording(path: Path) -> Recording:
    """Return what a file holds. It is never held in memory as a whole.

    Raises
    ------
    OSError
        if the file cannot be read.
    BadRecording
        if it is not a recording.
    """
    recording = Recording(path)
    with path.open("rb") as file:
        end = _read_records(file, recording)
        recording.is_cut_off = end < os.fstat(file.fileno()).st_size
    if not recording.runs:
        raise BadRecording(NOT_ONE)
    recording.exchanges.sort(key=lambda exchange: exchange.arrival)
    first = recording.exchanges[0].arrival if recording.exchanges else 0.0
    for exchange in recording.exchanges:
        exchange.arrival -= first
    return recording


def _read_records(file: BinaryIO, recording: Recording) -> int:
    """Add every whole record to the recording, and return where the last one ends."""
    end = 0
    begin_of_run = 0.0
    latest = 0.0
    unanswered: dict[int, Exchange] = {}
    for offset, length in frames_in(file):
        end = offset + length
        file.seek(offset)
        match decode(file.read(length)):
            case Started() as started:
                recording.runs.append(started)
                begin_of_run = latest
                unanswered = {}
            case File(hash=hash):
                recording._files[hash] = (offset, length)
            case Asked() as asked:
                exchange = Exchange(asked, begin_of_run + asked.arrival)
                latest = max(latest, exchange.arrival)
                recording.exchanges.append(exchange)
                unanswered[asked.number] = exchange
            case Answered() as answered:
                if found := unanswered.pop(answered.number, None):
                    found.answered = answered
    return end
