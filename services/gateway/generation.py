"""What the two front doors (OpenAI HTTP, gRPC) hand to the gateway's core, and what comes back."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from common.messages import Sampling, Stopping, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One validated request. `prompt` is UTF-8 JSON of chat messages whose image parts are {"type":
    "image"}, in the order of `images` (encoded files); or little-endian int64 token ids with one
    placeholder an image."""

    request_id: str
    prompt_kind: str
    prompt: bytes
    images: tuple[bytes, ...] = ()
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    timeout: float | None = None
    """Seconds until the deadline; None means the gateway's own."""
    return_prompt_token_ids: bool = False
    guide_kind: str = ""
    """json_object, json_schema or regex, with its text in `guide`; empty where the answer is free.
    """
    guide: str = ""


@dataclass(frozen=True, slots=True)
class Began:
    """The first event: the prompt is being answered."""

    prompt_token_ids: list[int] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens and the text that became certain with them; either may be empty."""

    offset: int
    token_ids: list[int]
    text: str
    logprobs: list[dict[str, Any]]
    """One OpenAI `logprobs.content` entry a token, each with its `token_id` and the `token_id`s of
    `top_logprobs` added; empty where none were asked for."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event."""

    finish_reason: str
    usage: Usage
    timings: dict[str, Any]
    """`preprocess_seconds`, `images` (list of `preprocess_seconds`, `queue_seconds`,
    `encode_seconds`, `cached`), `queue_seconds`, `prefill_seconds`, `decode_seconds`,
    `time_to_first_token_seconds`, `total_seconds`."""


Event = Began | Piece | Ended


class Core(Protocol):
    """What the doors need. `common.errors.ServingError` is raised on refusal (by `generate`'s
    entry) and on failure (by iterating)."""

    model_name: str

    @property
    def is_draining(self) -> bool:
        """Whether clients had better connect to another gateway for their next request."""
        ...

    def generate(
        self, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Admits the request and gives its events: Began, Pieces, Ended. Leaving the context before
        Ended aborts it everywhere."""
        ...

    def check_model(self, model: str | None) -> None:
        """Raises NotFound for a name that is not served."""
        ...

    def max_model_len(self) -> int | None:
        """Of the connected language groups; None while there is none."""
        ...

    def unready_reason(self) -> str:
        """Why no answer can be given now; empty when one can."""
        ...
