"""Does the jobs of a sandbox."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import msgspec
import numpy as np
from PIL.Image import Image

from common.chat import ChatOptions
from common.errors import InvalidRequest, ServingError, shorten
from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS
from common.wire import Buffer, Tensor
from services.preprocess import images
from services.preprocess.grammars import Grammars
from services.preprocess.preprocessor import Opened, Preprocessor
from services.preprocess.prompts import Piece, PromptParts, num_chars
from services.preprocess.sandbox import meter
from services.preprocess.sandbox.costs import BATCH_SECONDS, item_seconds
from services.preprocess.sandbox.jobs import (
    MAX_FAULT_CHARS,
    Job,
    Prepare,
    Prepared,
    PreparedFacts,
    Read,
    ReadDone,
    Refused,
    Result,
    Spell,
    Spelled,
)
from services.preprocess.sandbox.meter import CPU_SECONDS, ITEM_SECONDS, Meter
from services.preprocess.token_rules import word_sequences
from services.preprocess.videos import VideoForm

CHARS_A_SECOND = 500_000
"""No text is tokenized more slowly, so a text has this much more time than a unit."""

Answer = tuple[Result, list[Buffer]]
"""A result and its blobs."""


class Workbench:
    """What the jobs of one model need, loaded once."""

    def __init__(self, preprocessor: Preprocessor) -> None:
        self._preprocessor = preprocessor
        self._grammars = Grammars(preprocessor.vocabulary)

    def do(self, job: Job, blobs: Sequence[Buffer], limits: Meter) -> Answer:
        """Do a job, and return its result."""
        try:
            match job:
                case Read():
                    return self._read(job, blobs, limits)
                case Prepare():
                    items, patches = self._prepare(job.first, blobs, job, limits)
                    return Prepared(items), patches
                case Spell():
                    return Spelled(), [self._spelled(job, blobs[0], limits)]
                case _:
                    assert_never(job)
        except ServingError as e:
            return Refused(e.code, shorten(e.message, MAX_FAULT_CHARS), e.item), []
        except MemoryError:
            return Refused("InvalidRequest", "the request takes too much memory: send less"), []

    def _read(self, job: Read, blobs: Sequence[Buffer], limits: Meter) -> Answer:
        prompt, options, guide, words, *files = blobs
        self._preprocessor.check_kinds(job.kinds)
        token_ids = self._tokenize(job.prompt_kind, prompt, options, limits)
        self._preprocessor.find_placeholders(token_ids, job.kinds)
        grammar = self._check_guide(job, guide, limits)
        sequences = self._spell(words, limits)
        # One limit for all headers: those of honest files take microseconds.
        limits.begin(0)
        opened: list[Opened] = []
        num_tokens = []
        for index, (kind, file) in enumerate(zip(job.kinds, files, strict=True)):
            limits.note(index)
            with naming(kind, index):
                item = self._preprocessor.open_item(kind, file, job.forms.get(index, VideoForm()))
                opened.append(item)
                bounds = job.bounds.get(index, NO_BOUNDS)
                num_tokens.append(self._preprocessor.num_tokens_of(item, job.max_patches, bounds))
        sizes = tuple(map(size_of, opened))
        num_images = tuple(map(num_images_of, opened))
        items: tuple[PreparedFacts, ...] = ()
        patches: list[Buffer] = []
        costs = sum(map(item_seconds, map(len, files), sizes, num_images))
        if job.has_room and costs <= BATCH_SECONDS:
            items, patches = self._prepare(0, opened, job, limits)
        result = ReadDone(sizes, num_images, tuple(num_tokens), items)
        return result, [Tensor.of(token_ids).data, grammar, sequences, *patches]

    def _tokenize(self, kind: str, prompt: Buffer, options: Buffer, limits: Meter) -> np.ndarray:
        if kind == "token_ids":
            ids = np.frombuffer(prompt, dtype=np.int64)
            return self._preprocessor.check_token_ids(ids)
        parts: PromptParts
        if kind == "text":
            parts = [Piece(text_of(prompt))]
        else:
            limits.begin(meter.TEMPLATE)
            parts = self._preprocessor.render(messages_of(prompt), options_of(options))
        limits.begin(meter.TOKENIZER, CPU_SECONDS + num_chars(parts) / CHARS_A_SECOND)
        return self._preprocessor.encode(parts, is_chat=kind != "text")

    def _spelled(self, job: Spell, ids: Buffer, limits: Meter) -> bytes:
        """Return the names of tokens as a JSON list, or their text."""
        limits.begin(meter.TOKENIZER)
        token_ids = np.frombuffer(ids, dtype=np.int64).tolist()
        if job.names:
            return json.dumps(self._preprocessor.names_of(token_ids)).encode()
        return self._preprocessor.decode(token_ids).encode()

    def _spell(self, words: Buffer, limits: Meter) -> bytes:
        """Return the token sequences of bad words as JSON; empty if there are no words."""
        if not words:
            return b""
        limits.begin(meter.TOKENIZER)
        return json.dumps(word_sequences(self._preprocessor.vocabulary, words)).encode()

    def _check_guide(self, job: Read, guide: Buffer, limits: Meter) -> bytes:
        kind = job.guide_kind
        if not kind:
            return b""
        try:
            text = str(guide, "utf-8")
        except UnicodeDecodeError as e:
            raise InvalidRequest(f"the {kind} is not valid UTF-8") from e
        if self._grammars.is_needless(kind, text):
            return b""
        self._grammars.load()
        limits.begin(meter.GUIDE)
        return self._grammars.grammar(kind, text, job.guide_whitespace).encode()

    def _prepare(
        self,
        first: int,
        files: Sequence[Buffer | Opened],
        job: Read | Prepare,
        limits: Meter,
    ) -> tuple[tuple[PreparedFacts, ...], list[Buffer]]:
        """Prepare the items from index `first` on: files, or opened ones.

        Returns them, and the patches of each.
        """
        facts = []
        patches: list[Buffer] = []
        for index, (kind, file) in enumerate(zip(job.kinds, files, strict=True), first):
            began = time.monotonic()
            limits.begin(index, ITEM_SECONDS[kind])
            with naming(kind, index):
                item = self._preprocessor.prepare_item(
                    kind,
                    file,
                    job.max_patches,
                    job.forms.get(index, VideoForm()),
                    job.bounds.get(index, NO_BOUNDS),
                )
                patches.append(Tensor.of(item.patches()).data)
            facts.append(
                PreparedFacts(
                    kind,
                    item.mm_hash,
                    item.grid_thw,
                    item.content_size,
                    item.num_patches,
                    item.num_tokens,
                    time.monotonic() - began,
                    item.step_seconds,
                )
            )
        return tuple(facts), patches


def size_of(opened: Opened) -> tuple[int, int]:
    """Return the height and width of an opened item in pixels."""
    return images.size_of(opened) if isinstance(opened, Image) else opened.size


def num_images_of(opened: Opened) -> int:
    """Return how many images of its size an opened item costs."""
    return 1 if isinstance(opened, Image) else opened.num_images


@contextmanager
def naming(kind: ItemKind, index: int) -> Iterator[None]:
    """Put the name of an item in front of what is wrong with it."""
    try:
        yield
    except InvalidRequest as e:
        raise type(e)(f"{kind} {index}: {e.message}", item=index) from e


def messages_of(prompt: Buffer) -> Any:
    """Return the chat messages of a prompt. Raises InvalidRequest if it holds none."""
    try:
        return json.loads(bytes(prompt))
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("the messages are not valid JSON") from e


def options_of(options: Buffer) -> ChatOptions:
    """Return the options of messages; empty bytes mean the defaults."""
    if not len(options):
        return ChatOptions()
    try:
        return msgspec.json.decode(options, type=ChatOptions)
    except (msgspec.DecodeError, RecursionError) as e:
        raise InvalidRequest("the options of the chat template are malformed") from e


def text_of(prompt: Buffer) -> str:
    """Return a raw prompt."""
    try:
        return str(prompt, "utf-8")
    except UnicodeDecodeError as e:
        raise InvalidRequest("the prompt is not valid UTF-8") from e
