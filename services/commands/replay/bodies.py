"""Recorded requests as they are sent again: bodies for HTTP, and messages for gRPC."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from common.messages import Sampling, Stopping
from common.recording import Asked, BadRecording, Exchange, RecordedItem, RecordedRules
from proto.twinlens.inference.v1 import inference_pb2
from services.commands.chat_client import data_uri, media_type
from services.commands.replay.tools import ToolCall, call_body, chat_fields, without_tools

ReadFile = Callable[[str], bytes]
"""Returns the bytes of a file by its hash."""

ABORTED = "aborted"
HTTP_NAMES = {
    "include_stop": "include_stop_str_in_output",
    "repetition": "repetition_detection",
    "num_prompt_logprobs": "prompt_logprobs",
}
"""Fields of sampling and stopping whose names in bodies differ."""


class Message(msgspec.Struct):
    """A chat message of a recorded prompt. A part is {"type": ...}, and a text part has a text."""

    role: str
    content: str | list[dict[str, str]]
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


def needs_grpc(asked: Asked) -> bool:
    """Whether the HTTP API cannot express the request."""
    return asked.prompt_kind != "messages"


def http_body(exchange: Exchange, model: str, read_file: ReadFile) -> dict[str, Any]:
    """Return the body of the request for the endpoint of its task.

    Raises
    ------
    BadRecording
        if the recording is damaged.
    """
    asked = exchange.asked
    items = iter(asked.items)
    messages = [message_body(message, items, read_file) for message in messages_of(asked)]
    body: dict[str, Any] = {"model": asked.adapter or model, "messages": messages}
    if asked.task == "embed":
        return body | {"encoding_format": "base64"}
    if asked.task == "classify":
        return body
    values = set_values(asked.sampling) | set_values(stopping_of(exchange))
    if "num_logprobs" in values:
        values |= {"logprobs": True, "top_logprobs": values.pop("num_logprobs")}
    for name, known_as in HTTP_NAMES.items():
        if name in values:
            values[known_as] = values.pop(name)
    values |= set_values(asked.rules) if asked.rules else {}
    values |= {"n": asked.n} if asked.n > 1 else {}
    values |= {"priority": asked.priority} if asked.priority else {}
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    values |= chat_fields(asked) | response_format(without_tools(asked))
    return body | streamed | {"seed": asked.sampling.seed} | values


def set_values(values: Sampling | Stopping | RecordedRules) -> dict[str, Any]:
    """Return the fields that differ from their defaults, in the types of JSON."""
    defaults = type(values)()
    found: dict[str, Any] = msgspec.to_builtins(values)
    return {
        name: value
        for name, value in found.items()
        if getattr(values, name) != getattr(defaults, name)
    }


def messages_of(asked: Asked) -> list[Message]:
    try:
        return msgspec.json.decode(asked.prompt, type=list[Message])
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRecording(f"the prompt of request {asked.number} is damaged ({error})") from None


def message_body(
    message: Message, items: Iterator[RecordedItem], read_file: ReadFile
) -> dict[str, Any]:
    """Return a message as a body has it, with the next files in place of its images and videos."""
    body: dict[str, Any] = {
        "role": message.role,
        "content": content_of(message, items, read_file),
    }
    if message.tool_calls:
        body["tool_calls"] = list(map(call_body, message.tool_calls))
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    return body


def content_of(
    message: Message, items: Iterator[RecordedItem], read_file: ReadFile
) -> str | list[dict[str, Any]]:
    """Return the content of a message, with the next files in place of its images and videos."""
    if isinstance(message.content, str):
        return message.content
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if part.get("type") == "text":
            parts.append({"type": "text", "text": part.get("text", "")})
        elif item := next(items, None):
            parts.append(item_part(item, read_file(item.hash)))
        else:
            raise BadRecording("a prompt has more images than its request")
    return parts


def item_part(item: RecordedItem, data: bytes) -> dict[str, Any]:
    """Return an image or a video as a part of a message."""
    fields = {
        name: value
        for name in ("fps", "min_pixels", "max_pixels")
        if (value := getattr(item, name)) is not None
    }
    if item.kind == "image":
        url = data_uri(data, image_type(data))
        return {"type": "image_url", "image_url": {"url": url}} | fields
    if not item.frame_lengths:
        return {"type": "video_url", "video_url": {"url": data_uri(data, "video/mp4")}} | fields
    frames = [data_uri(frame, image_type(frame)) for frame in frames_of(item, data)]
    return {"type": "video", "video": frames} | fields


def frames_of(item: RecordedItem, data: bytes) -> list[bytes]:
    bounds = np.cumsum([0, *item.frame_lengths]).tolist()
    return [data[start:end] for start, end in pairwise(bounds)]


def image_type(data: bytes) -> str:
    """Return the media type of an image; servers look at the bytes of one that is not known."""
    return media_type(data) or "image/png"


def stopping_of(exchange: Exchange) -> Stopping:
    """Return when the answer ends.

    An aborted request asks for as many tokens as it got: the client would leave then.
    """
    stopping = exchange.asked.stopping
    answered = exchange.answered
    if not answered or answered.outcome != ABORTED:
        return stopping
    most = max(1, len(answered.token_ids))
    least = min(most, stopping.min_tokens)
    return msgspec.structs.replace(stopping, max_tokens=most, min_tokens=least)


def response_format(asked: Asked) -> dict[str, Any]:
    """Return the field of a body that makes the answer follow the guide of a request."""
    match asked.guide_kind:
        case "":
            return {}
        case "json_object" if not asked.guide_whitespace:
            return {"response_format": {"type": "json_object"}}
        case "json_schema" if not asked.guide_whitespace:
            schema = {"name": "recorded", "schema": schema_of(asked)}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case "json_object":
            guide: dict[str, Any] = {"json_object": True}
        case "json_schema":
            guide = {"json": schema_of(asked)}
        case "choice":
            guide = {"choice": schema_of(asked)}
        case kind:
            guide = {kind: asked.guide}
    if asked.guide_whitespace:
        guide["whitespace_pattern"] = asked.guide_whitespace
    return {"structured_outputs": guide}


def schema_of(asked: Asked) -> Any:
    try:
        return msgspec.json.decode(asked.guide)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRecording(f"the schema of request {asked.number} is damaged ({error})") from None


# gRPC

GrpcRequest = (
    inference_pb2.GenerateStreamRequest | inference_pb2.ClassifyRequest | inference_pb2.EmbedRequest
)


def grpc_request(exchange: Exchange, read_file: ReadFile) -> GrpcRequest:
    """Return the request of the method for its task.

    Raises
    ------
    BadRecording
        if the recording is damaged.
    """
    asked = exchange.asked
    fields: dict[str, Any] = {"model": asked.adapter}
    if asked.prompt_kind == "token_ids":
        fields["token_ids"] = inference_pb2.TokenIds(ids=token_ids_of(asked))
    elif asked.prompt_kind == "text":
        fields["raw_text"] = asked.prompt.decode(errors="replace")
    else:
        fields["text"] = text_of(messages_of(asked))
    files = [(item, read_file(item.hash)) for item in asked.items]
    fields["images"] = [
        inference_pb2.Image(data=data, min_pixels=item.min_pixels, max_pixels=item.max_pixels)
        for item, data in files
        if item.kind == "image"
    ]
    if asked.task == "classify":
        return inference_pb2.ClassifyRequest(**fields)
    if asked.task == "embed":
        return inference_pb2.EmbedRequest(**fields)
    fields["videos"] = [video_message(item, data) for item, data in files if item.kind == "video"]
    return inference_pb2.GenerateStreamRequest(**fields, **options(exchange))


def token_ids_of(asked: Asked) -> list[int]:
    """Return the prompt of a request that sent token ids."""
    ids = np.frombuffer(asked.prompt[: len(asked.prompt) // 8 * 8], "<i8")
    if ids.size and not (ids.min() >= 0 and ids.max() < 2**32):
        raise BadRecording(f"the prompt of request {asked.number} is damaged")
    return ids.tolist()


def text_of(messages: list[Message]) -> str:
    """Return the text of the one user turn that gRPC makes of a text."""
    content = messages[0].content if messages else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def video_message(item: RecordedItem, data: bytes) -> inference_pb2.Video:
    if not item.frame_lengths:
        return inference_pb2.Video(file=data, fps=item.fps)
    frames = [inference_pb2.Image(data=frame) for frame in frames_of(item, data)]
    return inference_pb2.Video(frames=frames, fps=item.fps)


def options(exchange: Exchange) -> dict[str, Any]:
    """Return sampling, stopping, guide and the form of the response."""
    asked = exchange.asked
    sampling = set_values(asked.sampling) | {"seed": asked.sampling.seed}
    if asked.rules:
        rules = set_values(asked.rules)
        if "logit_bias" in rules:
            rules["logit_bias"] = {int(id): value for id, value in rules["logit_bias"].items()}
        sampling |= rules
    stopping = set_values(stopping_of(exchange))
    for name in ("include_stop", "repetition"):
        if name in stopping:
            stopping[HTTP_NAMES[name]] = stopping.pop(name)
    response = {
        "num_logprobs": sampling.pop("num_logprobs", None),
        "num_prompt_logprobs": sampling.pop("num_prompt_logprobs", None),
        "skip_special_tokens": stopping.pop("skip_special_tokens", None),
    }
    guides: dict[str, dict[str, Any]] = {
        "json_object": {"json_object": True},
        "json_schema": {"json_schema": asked.guide},
        "regex": {"regex": asked.guide},
        "grammar": {"grammar": asked.guide},
    }
    if asked.guide_kind == "choice":
        guides["choice"] = {"choice": inference_pb2.Choices(texts=schema_of(asked))}
    guide = guides.get(asked.guide_kind, {})
    return {
        "sampling": inference_pb2.SamplingParams(**sampling),
        "stopping": inference_pb2.StoppingParams(**stopping),
        "response": inference_pb2.ResponseOptions(**response),
        "guide": inference_pb2.GuideParams(whitespace_pattern=asked.guide_whitespace, **guide),
        "n": asked.n,
        "priority": asked.priority,
    }
