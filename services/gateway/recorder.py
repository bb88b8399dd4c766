"""The observer that writes requests and their ends to a recording."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.config import BadSetting
from common.errors import ServingError
from common.logs import get_logger
from common.messages import TokenRules, Usage
from common.recording import Answered, Asked, File, RecordedItem, RecordedRules, file_hash
from common.settings import GatewaySettings
from services.gateway.generation import (
    Began,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    Result,
)
from services.gateway.observers import Observation
from services.gateway.recording_file import DISK_ERRORS, RecordingFile, open_recording
from services.gateway.videos import Media, Video, bounds_of, bytes_of

RECORD_BYTES = 1000
"""Roughly what a record takes besides the bytes of a prompt, a file or an answer."""


def start_recorder(settings: GatewaySettings) -> "Recorder | None":
    """Return the observer that `--record` asks for, or None.

    A disk that is full or may only be read does not keep the gateway from serving: a gateway that
    is started again may find it in this state.

    Raises
    ------
    BadSetting
        if the file cannot be a recording of this gateway.
    """
    if not settings.record:
        return None
    path = Path(settings.record)
    try:
        file = open_recording(path)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            get_logger().warning("no requests are recorded: the disk failed", reason=str(error))
            return None
        raise BadSetting(
            f"--record: cannot write {path} ({error.strerror}): name a file in a folder where this "
            "user may write"
        ) from error
    get_logger().info("recording requests, which are users' data", file=str(path))
    return Recorder(RecordingFile(file, settings.record_mib << 20, settings.served_model_name))


class Unrecorded:
    """The observation of a request that is not recorded."""

    def on_event(self, event: GenerationEvent) -> None:
        pass

    def on_end(self, outcome: str, error: ServingError | None) -> None:
        pass


UNRECORDED = Unrecorded()


class Recorder:
    """Records each admitted request and its end.

    The event loop only collects. Hashes and files are the work of the file's thread, and the
    members that begin with an underscore are its own.
    """

    def __init__(self, file: RecordingFile) -> None:
        self.file = file
        self.began = time.monotonic()
        self.num_requests = 0
        self._hashes: set[str] = set()
        """The hashes of the clients' files that the recording holds."""
        self._open: set[int] = set()
        """The numbers of the recorded requests that have not ended."""

    def begin(self, request: GenerationRequest, arrival: float) -> Observation:
        if request.task in ("tokenize", "detokenize"):  # such a request generates no load
            return UNRECORDED
        number = self.num_requests
        num_bytes = len(request.prompt) + sum(map(len, request.images)) + RECORD_BYTES
        work = partial(self._write_request, request, number, arrival)
        if self.file.is_full or not self.file.submit(work, num_bytes):
            return UNRECORDED
        self.num_requests += 1
        return RecordedRequest(self, number, arrival)

    def on_refused(self, request: GenerationRequest, arrival: float, error: ServingError) -> None:
        """Refused requests are not recorded."""

    def end(self, answered: Answered) -> None:
        num_bytes = len(answered.text) + 8 * len(answered.token_ids) + RECORD_BYTES
        self.file.submit(partial(self._write_end, answered), num_bytes)

    def close(self) -> None:
        self.file.close()

    def _write_request(self, request: GenerationRequest, number: int, arrival: float) -> None:
        if self.file.is_full:
            return
        items = [recorded_item(media) for media in request.images]
        new = {
            item.hash: bytes_of(media)
            for item, media in zip(items, request.images, strict=True)
            if item.hash not in self._hashes
        }
        num_bytes = len(request.prompt) + sum(map(len, new.values())) + RECORD_BYTES
        if not self.file.has_room(num_bytes):
            return
        for hash, data in new.items():
            self.file.write(File(hash=hash, data=bytes(data)))
        self._hashes |= new.keys()
        self.file.write(asked(request, items, number, max(0.0, arrival - self.began)))
        self._open.add(number)

    def _write_end(self, answered: Answered) -> None:
        if answered.number in self._open:
            self._open.remove(answered.number)
            self.file.write(answered)


class RecordedRequest:
    """Collects the answer of one recorded request."""

    def __init__(self, recorder: Recorder, number: int, arrival: float) -> None:
        self._recorder = recorder
        self._number = number
        self._arrival = arrival
        self._first_token: float | None = None
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._end: Ended | Result | None = None

    def on_event(self, event: GenerationEvent) -> None:
        match event:
            case Began(choice=0):
                self._first_token = time.monotonic()
            case Piece(choice=0):
                self._token_ids += event.token_ids
                self._texts += [event.text, *(part["arguments"] for part in event.tool_calls)]
            case Ended(is_last=True) | Result():
                self._end = event

    def on_end(self, outcome: str, error: ServingError | None) -> None:
        first = self._first_token
        end = self._end
        answered = Answered(
            number=self._number,
            outcome=outcome,
            error=error.message if error else "",
            error_stage=error.stage if error else "",
            seconds=time.monotonic() - self._arrival,
            first_token_seconds=None if first is None else first - self._arrival,
            token_ids=self._token_ids,
            text="".join(self._texts),
            values=end.values.astype("<f4").tobytes() if isinstance(end, Result) else b"",
            usage=end.usage if end else Usage(),
            timings=end.timings if end else {},
        )
        self._recorder.end(answered)


def recorded_item(media: Media) -> RecordedItem:
    """Return what a request has of an image or a video, which refers to its bytes by their hash."""
    bounds = bounds_of(media)
    item = partial(
        RecordedItem,
        hash=file_hash(bytes_of(media)),
        min_pixels=bounds.min_pixels,
        max_pixels=bounds.max_pixels,
    )
    if not isinstance(media, Video):
        return item()
    return item(kind="video", frame_lengths=media.frame_lengths, fps=media.fps)


def recorded_rules(rules: TokenRules | None) -> RecordedRules | None:
    """Return the rules of a request in the words of the API."""
    if rules is None:
        return None
    ids = rules.bias_token_ids.numpy().tolist() if rules.bias_token_ids else []
    values = rules.bias_values.numpy().tolist() if rules.bias_values else []
    allowed = rules.allowed_token_ids
    return RecordedRules(
        logit_bias={str(id): value for id, value in zip(ids, values, strict=True)},
        allowed_token_ids=allowed.numpy().tolist() if allowed else None,
        bad_words=json.loads(rules.bad_words.bytes()) if rules.bad_words else [],
        no_repeat_ngram_size=rules.no_repeat_ngram_size,
    )


def asked(
    request: GenerationRequest, items: Sequence[RecordedItem], number: int, arrival: float
) -> Asked:
    """Return the record of a request that arrived this many seconds after the begin of the run."""
    return Asked(
        number=number,
        request_id=request.request_id,
        arrival=arrival,
        api=request.api,
        task=request.task,
        prompt_kind=request.prompt_kind,
        prompt=bytes(request.prompt),
        items=tuple(items),
        sampling=request.sampling,
        stopping=request.stopping,
        guide_kind=request.guide_kind,
        guide=request.guide,
        guide_whitespace=request.guide_whitespace,
        rules=recorded_rules(request.token_rules),
        n=request.n,
        priority=request.priority,
        timeout=request.timeout,
        chat_options=request.chat_options,
        adapter=request.adapter,
    )
