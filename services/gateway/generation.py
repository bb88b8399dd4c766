"""The interface between the API servers (OpenAI HTTP and gRPC) and the gateway's core."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from common.boxes import Box
from common.messages import Sampling, Stopping, Task, TokenRules, Usage
from common.tracing import NO_SPAN, Span
from services.gateway.adapters import AdaptersOfGroups
from services.gateway.videos import Media


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One validated request.

    `prompt_kind` says what `prompt` holds. "messages" is UTF-8 JSON of chat messages, in which an
    image stands as {"type": "image"} and a video as {"type": "video"}, in the order of `images`.
    "text" is UTF-8, read as the tokenizer reads it. "token_ids" is little-endian int64 token ids
    with one placeholder for each image and video.
    """

    request_id: str
    prompt_kind: str
    prompt: bytes
    chat_options: bytes = b""
    """UTF-8 JSON of the `ChatOptions` (`common/chat.py`) of messages; empty for the defaults."""
    images: tuple[Media, ...] = ()
    """The encoded images, and the videos."""
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    timeout: float | None = None
    """Seconds until the deadline; None means the gateway's own default."""
    return_prompt_token_ids: bool = False
    guide_kind: str = ""
    """A `GuideKind` of `common/messages.py`; empty if the answer is not constrained."""
    guide: str = ""
    """What the answer must follow, by its kind."""
    guide_whitespace: str = ""
    """Regular expression of the white space between the tokens of guided JSON; empty for none."""
    token_rules: TokenRules | None = None
    n: int = 1
    """The number of answers, at most MAX_CHOICES. Answer i has the seed of `sampling` plus i."""
    priority: int = 0
    """Requests with lower values come first."""
    adapter: str = ""
    """The LoRA adapter that answers; empty for the model itself."""
    reads_tool_calls: bool = False
    """Whether the tool calls of the answer are taken out of its text."""
    task: Task = "generate"
    returns_token_names: bool = False
    """Whether the tokens of the task tokenize are named."""
    api: Literal["http", "grpc"] = "http"
    """Through which API it came."""
    traceparent: str = ""
    """The client's span, as `read_traceparent` returns it; empty if it sent none."""
    span: Span = NO_SPAN
    """The span of the request at this gateway, set by `MeasuredCore`."""


@dataclass(frozen=True, slots=True)
class Began:
    """The first event of an answer: the first token exists."""

    prompt_token_ids: list[int] | None
    timings: dict[str, Any] = field(default_factory=dict)
    """The fields of the proto message Timings that are known by now."""
    choice: int = 0
    """The index of the answer among the `n` of its request."""
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    """One OpenAI `logprobs.content` entry for each token of the prompt, and None for the first one;
    None as a whole if the client asked for none. An entry also has a `rank`, which is 1 if the
    token was the most likely one in its place."""
    usage: Usage = Usage()
    """The token counts of the prompt."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens and the text that became certain with them; either may be empty."""

    offset: int
    """The number of tokens before this piece."""
    token_ids: list[int]
    text: str
    logprobs: list[dict[str, Any]]
    """One OpenAI `logprobs.content` entry for each token; empty if the client asked for none.

    The entries and their `top_logprobs` also have a `token_id`, which OpenAI's do not have.
    """
    tool_calls: Sequence[dict[str, Any]] = ()
    """The parts of tool calls that became certain, at most one of each call. A part has the `index`
    of its call and more of its `arguments`. The first part of a call has its `id` and `name`, too.
    They come after the text. A call with a part that is `withdrawn` was malformed, and its text
    follows whole in the next piece."""
    choice: int = 0
    """The index of the answer among the `n` of its request."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes in pixels of one image of the request, as it was sent and upright."""

    image: int
    """Index of the image."""
    boxes: list[Box]


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of an answer that succeeds. A request ends with the last of its answers."""

    finish_reason: str
    """stop, length, repetition or tool_calls."""
    usage: Usage
    timings: dict[str, Any]
    """The fields of the proto message Timings, by name."""
    boxes: Boxes | None = None
    """The boxes that the answer marks; None if the model's answers mark none."""
    choice: int = 0
    """The index of the answer among the `n` of its request."""
    is_last: bool = True
    """Whether it ends the request. Then `usage` counts all answers, and the prompt once."""


@dataclass(frozen=True, slots=True)
class Result:
    """The last event of a request that asks for no text."""

    values: np.ndarray
    """float32 [n]: the probability of each label, or an embedding of length 1."""
    labels: list[str]
    """The n labels; empty for an embedding."""
    usage: Usage
    timings: dict[str, Any]
    """The fields of the proto message Timings, by name."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """The only event of a request that asks for tokens of a prompt, or for the text of tokens."""

    token_ids: list[int]
    """The tokens of the prompt, those of its items included; empty for the task detokenize."""
    token_names: list[str] | None
    """Their names in the vocabulary, if they were asked for."""
    text: str
    """The text of the tokens; empty for the task tokenize."""


GenerationEvent = Began | Piece | Ended | Result | Conversion


class Core(Protocol):
    """What the API servers need from the gateway's core."""

    model_name: str
    request_timeout: float
    """Seconds until the deadline of a request that sets none."""

    @property
    def is_draining(self) -> bool:
        """Whether clients should connect to another gateway for their next request."""
        ...

    def generate(
        self, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Admit the request and return its events: Began, any number of Pieces, Ended.

        If it asks for several answers, each has these events, and those of all come in the order
        in which they are made, but the first answer begins first. If it asks for no text, they are
        Began and Result, or one Conversion. Leaving the context before the last event aborts the
        request in every stage.

        Raises
        ------
        ServingError
            on entering the context if the request is refused; on iterating if it fails later.
        """
        ...

    def check_model(self, model: str | None) -> str:
        """Return the LoRA adapter that `model` names; empty for the served model itself.

        Raises
        ------
        NotFound
            if `model` is not empty, and neither the served model nor one of its adapters.
        """
        ...

    @property
    def adapters(self) -> AdaptersOfGroups:
        """The LoRA adapters of the language groups."""
        ...

    def max_model_len(self) -> int | None:
        """Return the context length in tokens, or None while no language group is ready."""
        ...

    def unready_reason(self) -> str:
        """Return why no request can be answered at present; empty if the gateway is ready."""
        ...


async def last_of(events: AsyncIterator[GenerationEvent]) -> Result:
    """Return the last event of a request that asks for no text."""
    async for event in events:
        if isinstance(event, Result):
            return event
    raise AssertionError("the request ended without a result")


async def conversion_of(events: AsyncIterator[GenerationEvent]) -> Conversion:
    """Return the only event of a request to tokenize or detokenize."""
    async for event in events:
        assert isinstance(event, Conversion)
        return event
    raise AssertionError("the request ended without a result")
