"""The bodies of /tokenize and /detokenize, and their translation to GenerationRequests."""

from dataclasses import replace
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field

from services.gateway.chat_messages import Body, ChatMessage, check_text_length
from services.gateway.generation import GenerationRequest
from services.gateway.invalid_field import InvalidField
from services.gateway.json_bodies import read_body
from services.gateway.schema import ChatRequest, chat_to_generation, checked_chat
from services.gateway.tools import MAX_TOOLS, Tool
from services.gateway.unsupported import IN_REQUEST, refuse_unsupported

CHAT_FIELDS = {
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "mm_processor_kwargs",
}


class TokenizeRequest(Body):
    """The body of a request for the tokens of a prompt, with the names of vLLM's interface."""

    model: str | None = None
    prompt: str | None = None
    """Read as the tokenizer reads it."""
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    """Changes nothing: no tokenizer of the served families adds tokens by itself."""
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of a request for the text of tokens, with the names of vLLM's interface."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


R = TypeVar("R", TokenizeRequest, DetokenizeRequest)


def parse(body: bytes | bytearray, kind: type[R]) -> R:
    """Return a body of this kind, or raise InvalidRequest."""
    request = read_body(body, kind)
    refuse_unsupported(request.model_extra or {}, IN_REQUEST)
    return request


def to_tokenize(
    body: TokenizeRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> GenerationRequest:
    """Return a request for the tokens of a prompt, or raise InvalidRequest."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidField("prompt", "send either prompt, which is a text, or messages")
    request = (
        raw_text(body, request_id, timeout, max_model_len)
        if body.messages is None
        else chat(body, request_id, timeout, max_model_len)
    )
    return replace(request, task="tokenize", returns_token_names=bool(body.return_token_strs))


def raw_text(
    body: TokenizeRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> GenerationRequest:
    for name in sorted(CHAT_FIELDS - {"messages"}):
        if getattr(body, name) not in (None, {}, []):
            raise InvalidField(name, "a prompt has none of this; leave it out, or send messages")
    assert body.prompt is not None
    check_text_length([{"content": body.prompt}], max_model_len, "prompt")
    return GenerationRequest(
        request_id=request_id, prompt_kind="text", prompt=encoded(body.prompt), timeout=timeout
    )


def encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidField("prompt", "half of a surrogate pair; send valid Unicode") from None


def chat(
    body: TokenizeRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> GenerationRequest:
    given = {name: getattr(body, name) for name in CHAT_FIELDS}
    asked = checked_chat(ChatRequest.model_construct(**given))
    request = chat_to_generation(asked, request_id, timeout, max_model_len)
    return replace(request, reads_tool_calls=False)


def to_detokenize(
    body: DetokenizeRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> GenerationRequest:
    """Return a request for the text of tokens, or raise InvalidRequest."""
    if max_model_len is not None and len(body.tokens) > max_model_len:
        raise InvalidField(
            "tokens", f"more tokens than the context of {max_model_len} holds; send fewer"
        )
    return GenerationRequest(
        request_id=request_id,
        prompt_kind="token_ids",
        prompt=np.asarray(body.tokens, "<i8").tobytes(),
        timeout=timeout,
        task="detokenize",
    )
