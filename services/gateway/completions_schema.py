"""The body of POST /v1/completions, and its translation to GenerationRequests."""

import math
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from pydantic import Field

from services.gateway.chat_messages import Body
from services.gateway.generation import GenerationRequest
from services.gateway.invalid_field import BeyondContext, InvalidField
from services.gateway.json_bodies import read_body
from services.gateway.limits import MAX_TOKEN_BYTES
from services.gateway.schema import ChatRequest, chat_to_generation, read_chat
from services.gateway.token_rules import MAX_TOKEN_ID

MAX_PROMPTS = 128
"""The most prompts of one body."""
DEFAULT_MAX_TOKENS = 16
"""As OpenAI has it."""
NO_MESSAGE = {"role": "user", "content": ""}
OF_CHATS = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "mm_processor_kwargs",
)
"""Fields that only a chat has."""
UNSUPPORTED = {
    "suffix": "the model cannot fill a gap; leave it out",
    "prompt_embeds": "embeddings are not taken as a prompt; send prompt",
}


class CompletionsRequest(Body):
    """The body of a completion.

    Sampling values, and whatever else a chat completion takes, are among the extra fields.
    """

    model: str | None = None
    prompt: str | list[Any]
    """A text, a list of texts, token ids, or a list of those."""
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=0, le=2**31)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts of the body. Raises InvalidField if there are none, or they are malformed."""
        given = self.prompt
        if isinstance(given, str) or is_ids(given):
            return [given]
        if not given or len(given) > MAX_PROMPTS:
            raise InvalidField("prompt", f"must be 1 to {MAX_PROMPTS} prompts, not {len(given)}")
        for index, prompt in enumerate(given):
            if not isinstance(prompt, str) and not is_ids(prompt):
                raise InvalidField(f"prompt[{index}]", "must be a text, or a list of token ids")
        return given


def is_ids(given: Any) -> bool:
    """Whether this is a list of token ids."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(type(one) is int and 0 <= one <= MAX_TOKEN_ID for one in given)
    )


@dataclass(frozen=True, slots=True)
class AskedPrompts:
    """What a body asks for."""

    chat: ChatRequest
    """The fields that a completion shares with a chat."""
    requests: list[GenerationRequest]
    """One for each prompt."""


def parse_completions(body: bytes | bytearray) -> CompletionsRequest:
    """Return the body of a completion, or raise InvalidRequest."""
    request = read_body(body, CompletionsRequest)
    given = request.model_extra or {}
    for name, problem in UNSUPPORTED.items():
        if given.get(name) not in (None, ""):
            raise InvalidField(name, problem)
    for name in OF_CHATS:
        if given.get(name) is not None:
            raise InvalidField(name, "only chat completions have this; leave it out")
    if request.max_tokens == 0 and not request.echo:
        raise InvalidField("max_tokens", "must be at least 1 without echo: true")
    return request


def to_generations(
    request: CompletionsRequest,
    request_id: str,
    timeout: float | None,
    max_model_len: int | None,
) -> AskedPrompts:
    """Return the requests of a body, each with an id of its own if there are several.

    Raises
    ------
    InvalidRequest
        if a value is wrong.
    """
    values = dict(request.model_extra or {}) | {
        "model": request.model,
        "messages": [NO_MESSAGE],
        # A model makes at least one token, which is dropped if none is wanted.
        "max_tokens": request.max_tokens or (1 if request.max_tokens == 0 else None),
        "stream": request.stream,
        "logprobs": request.logprobs is not None,
        "top_logprobs": request.logprobs or None,
    }
    chat = read_chat({name: value for name, value in values.items() if value is not None})
    base = chat_to_generation(chat, request_id, timeout, max_model_len)
    if request.echo and request.logprobs is not None:
        sampling = msgspec.structs.replace(base.sampling, num_prompt_logprobs=request.logprobs)
        base = replace(base, sampling=sampling)
    prompts = request.prompts
    requests = []
    for index, prompt in enumerate(prompts):
        own_id = f"{request_id}-{index}" if len(prompts) > 1 else request_id
        kind, encoded = encode_prompt(prompt, max_model_len or math.inf)
        requests.append(replace(base, request_id=own_id, prompt_kind=kind, prompt=encoded))
    return AskedPrompts(chat, requests)


def encode_prompt(prompt: str | list[int], max_model_len: float) -> tuple[str, bytes]:
    """Return the kind and the bytes of a prompt, as GenerationRequest has them."""
    if not isinstance(prompt, str):
        return "token_ids", np.array(prompt, "<i8").tobytes()
    if not prompt:
        raise InvalidField("prompt", "must not be empty")
    if len(prompt) > max_model_len * MAX_TOKEN_BYTES:
        problem = f"The prompt has {len(prompt)} characters, which do not fit: send less text."
        raise BeyondContext("prompt", int(max_model_len), problem)
    return "text", prompt.encode(errors="surrogatepass")
