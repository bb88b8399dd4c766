"""The bodies of /v1/classify and /v1/embeddings, and their translation to GenerationRequests."""

from typing import Any, TypeVar

from pydantic import Field

from common.messages import Task
from services.gateway.chat_messages import (
    Body,
    ChatMessage,
    check_message_count,
    check_text_length,
    encode_messages,
    read_message,
)
from services.gateway.generation import GenerationRequest
from services.gateway.image_parts import bounded
from services.gateway.invalid_field import InvalidField
from services.gateway.json_bodies import read_body
from services.gateway.unsupported import IN_POOLING, refuse_unsupported
from services.gateway.videos import Media

MAX_INPUTS = 2048
"""The most texts in one request for embeddings, as OpenAI has it."""
ENCODING_FORMATS = ("float", "base64")


class PoolingRequest(Body):
    """What the bodies of both endpoints have."""

    model: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    mm_processor_kwargs: dict[str, Any] | None = None


class ClassifyRequest(PoolingRequest):
    """The body of a classification, with the names of vLLM's interface."""

    top_k: int | None = Field(None, ge=1)
    """Answer with the most likely labels only, this number of them."""


class EmbeddingsRequest(PoolingRequest):
    """The body of a request for embeddings, with the names of OpenAI's interface."""

    input: Any = None
    encoding_format: str | None = None
    dimensions: int | None = Field(None, ge=1)
    timings: bool | None = None
    """Whether each embedding comes with its stage timings."""


R = TypeVar("R", bound=PoolingRequest)


def parse_classify(body: bytes | bytearray) -> ClassifyRequest:
    """Return the body of a classification, or raise InvalidRequest."""
    request = parse(body, ClassifyRequest)
    if request.messages is None:
        raise InvalidField("messages", "missing; send one message with the image and the text")
    return request


def parse_embeddings(body: bytes | bytearray) -> EmbeddingsRequest:
    """Return the body of a request for embeddings, or raise InvalidRequest."""
    request = parse(body, EmbeddingsRequest)
    if (request.input is None) == (request.messages is None):
        raise InvalidField("input", "send either input, with texts, or messages, with an image")
    if request.encoding_format not in (None, *ENCODING_FORMATS):
        raise InvalidField(
            "encoding_format", f"this is not supported; use {' or '.join(ENCODING_FORMATS)}"
        )
    return request


def parse(body: bytes | bytearray, kind: type[R]) -> R:
    request = read_body(body, kind)
    check_message_count(request.messages or [])
    refuse_unsupported(request.model_extra or {}, IN_POOLING)
    return request


def texts_of(given: Any) -> list[str]:
    """Return the texts in `input`, or raise InvalidField."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise InvalidField("input", "must be a text or a list of texts")
    if len(texts) > MAX_INPUTS:
        raise InvalidField("input", f"more than {MAX_INPUTS} texts are not accepted; send fewer")
    for index, text in enumerate(texts):
        if isinstance(text, int | list):
            raise InvalidField("input", "token ids are not supported; send texts")
        if not isinstance(text, str) or not text:
            raise InvalidField(f"input[{index}]", "must be a text that is not empty")
    return texts


def to_pooling(
    task: Task,
    messages: list[ChatMessage],
    request_id: str,
    timeout: float | None,
    max_model_len: int | None,
    processor_kwargs: dict[str, Any] | None = None,
) -> GenerationRequest:
    """Return messages as a request for this task, or raise InvalidRequest if one is wrong."""
    images: list[Media] = []
    read = [read_message(message, f"messages[{n}]", images) for n, message in enumerate(messages)]
    check_text_length(read, max_model_len)
    return GenerationRequest(
        request_id=request_id,
        prompt_kind="messages",
        prompt=encode_messages(read),
        images=bounded(images, processor_kwargs),
        timeout=timeout,
        task=task,
    )


def to_embeddings(
    body: EmbeddingsRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> list[GenerationRequest]:
    """Return a request for each embedding that a body asks for, or raise InvalidRequest.

    Each has an id of its own if there are several.
    """
    if body.messages is not None:
        kwargs = body.mm_processor_kwargs
        return [to_pooling("embed", body.messages, request_id, timeout, max_model_len, kwargs)]
    if body.mm_processor_kwargs:
        raise InvalidField("mm_processor_kwargs", "texts in input have no images; send messages")
    texts = texts_of(body.input)
    requests = []
    for index, text in enumerate(texts):
        name = f"{request_id}-{index}" if len(texts) > 1 else request_id
        message = ChatMessage(role="user", content=text)
        requests.append(to_pooling("embed", [message], name, timeout, max_model_len))
    return requests
