"""gRPC messages of the inference API to and from the types of `generation.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from common.boxes import Box
from common.errors import InvalidRequest, ServingError, shorten
from common.grpc_server import MAX_ERROR_CHARS
from common.messages import MAX_CHOICES, Task, Usage
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.chat_messages import encode_messages
from services.gateway.generation import (
    Began,
    Conversion,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    Result,
)
from services.gateway.grpc_chat import read_chat, read_chat_options
from services.gateway.grpc_tools import read_chat_tools, tool_call_deltas, tool_call_messages
from services.gateway.guides import NO_GUIDE, Guide, choice_guide, text_guide, with_whitespace
from services.gateway.invalid_field import InvalidField
from services.gateway.json_bounds import check_json
from services.gateway.parameters import make_sampling, make_stopping
from services.gateway.pooled import best_classes
from services.gateway.repetition import make_repetition
from services.gateway.schema import MAX_TIMEOUT
from services.gateway.token_rules import make_token_rules
from services.gateway.videos import Media, check_media, item_of

FINISH_REASONS = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "repetition": inference_pb2.FINISH_REASON_REPETITION,
    "tool_calls": inference_pb2.FINISH_REASON_TOOL_CALLS,
}
TOKEN_RULES = ("logit_bias", "allowed_token_ids", "bad_words", "no_repeat_ngram_size")
"""The fields of SamplingParams that are not those of a Sampling."""

GenerateRequest = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest
PoolingRequest = inference_pb2.ClassifyRequest | inference_pb2.EmbedRequest
ConversionRequest = inference_pb2.TokenizeRequest | inference_pb2.DetokenizeRequest
InferenceRequest = GenerateRequest | PoolingRequest | ConversionRequest
Images = tuple[Media, ...]

# Requests


def to_generation(
    request: GenerateRequest,
    images: Images,
    request_id: str,
    timeout: float | None,
    max_model_len: int | None,
) -> GenerationRequest:
    """Return the request of either method as a GenerationRequest.

    `timeout` is in seconds, and None without a deadline. `max_model_len` is the context length in
    tokens, or None if it is not known.

    Raises
    ------
    InvalidRequest
        if a value is missing or wrong.
    """
    check_media(images)
    prompt_kind, prompt = read_prompt(request, images)
    sampling = fields_set(request.sampling)
    rules = {name: sampling.pop(name, None) for name in TOKEN_RULES}
    stopping = fields_set(request.stopping)
    stopping["include_stop"] = stopping.pop("include_stop_str_in_output", None)
    loops = stopping.pop("repetition_detection", None)
    stopping["repetition"] = make_repetition(None if loops is None else fields_set(loops))
    response = fields_set(request.response)
    sampling["num_logprobs"] = response.get("num_logprobs")
    sampling["num_prompt_logprobs"] = response.get("num_prompt_logprobs")
    stopping["skip_special_tokens"] = response.get("skip_special_tokens")
    tool_use = read_chat_tools(request.chat)
    guide = read_guide(request.guide)
    guide_kind, guide_text = tool_use.guide_with(guide.kind, guide.text)
    return GenerationRequest(
        request_id=request_id,
        prompt_kind=prompt_kind,
        prompt=prompt,
        images=images,
        sampling=make_sampling(sampling),
        stopping=make_stopping(stopping, max_model_len),
        timeout=bounded(timeout),
        return_prompt_token_ids=request.response.return_prompt_token_ids,
        guide_kind=guide_kind,
        guide=guide_text,
        guide_whitespace=guide.whitespace,
        n=read_n(request),
        priority=request.priority,
        chat_options=read_chat_options(request.chat, tool_use),
        reads_tool_calls=bool(tool_use.tools),
        token_rules=make_token_rules(**rules),
        api="grpc",
    )


def read_n(request: GenerateRequest) -> int:
    """Return the number of answers, or raise InvalidField."""
    if request.n > MAX_CHOICES:
        raise InvalidField("n", f"at most {MAX_CHOICES} answers are possible")
    return request.n or 1


def to_request(
    request: InferenceRequest,
    images: Images,
    request_id: str,
    timeout: float | None,
    max_model_len: int | None,
) -> GenerationRequest:
    """Return the request of any method, as `to_generation` does."""
    match request:
        case inference_pb2.ClassifyRequest():
            if request.HasField("top_k") and not request.top_k:
                raise InvalidField("top_k", "must be at least 1; leave it out for all labels")
            return to_pooling("classify", request, images, request_id, timeout)
        case inference_pb2.EmbedRequest():
            return to_pooling("embed", request, images, request_id, timeout)
        case inference_pb2.TokenizeRequest() | inference_pb2.DetokenizeRequest():
            return to_conversion(request, images, request_id, timeout)
        case _:
            return to_generation(request, images, request_id, timeout, max_model_len)


def to_pooling(
    task: Task,
    request: PoolingRequest,
    images: Images,
    request_id: str,
    timeout: float | None,
) -> GenerationRequest:
    """Return a request for something other than a text, or raise InvalidRequest."""
    check_media(images)
    prompt_kind, prompt = read_prompt(request, images)
    return GenerationRequest(
        request_id=request_id,
        prompt_kind=prompt_kind,
        prompt=prompt,
        images=images,
        timeout=bounded(timeout),
        task=task,
        api="grpc",
    )


def to_conversion(
    request: ConversionRequest, images: Images, request_id: str, timeout: float | None
) -> GenerationRequest:
    """Return a request for the tokens of a prompt or for the text of tokens, or raise
    InvalidRequest."""
    check_media(images)
    prompt_kind, prompt = read_prompt(request, images)
    task: Task = "detokenize"
    options = b""
    if isinstance(request, inference_pb2.TokenizeRequest):
        task = "tokenize"
        options = read_chat_options(request.chat, read_chat_tools(request.chat))
    return GenerationRequest(
        request_id=request_id,
        prompt_kind=prompt_kind,
        prompt=prompt,
        images=images,
        timeout=bounded(timeout),
        task=task,
        chat_options=options,
        api="grpc",
    )


def bounded(timeout: float | None) -> float | None:
    """Return the seconds that a client allows, within what a request may have."""
    return None if timeout is None else min(max(timeout, 0.0), MAX_TIMEOUT)


def read_guide(params: inference_pb2.GuideParams) -> Guide:
    """Return what the answer follows, or raise InvalidField if it cannot be followed."""
    guide = NO_GUIDE
    match params.WhichOneof("guide"):
        case "json_object" if params.json_object:
            guide = Guide("json_object")
        case "json_schema":
            check_json(params.json_schema.encode())
            guide = Guide("json_schema", params.json_schema)
        case "regex":
            guide = Guide("regex", params.regex)
        case "choice":
            guide = choice_guide(list(params.choice.texts), "guide.choice.texts")
        case "grammar":
            guide = text_guide("grammar", params.grammar, "guide.grammar")
    return with_whitespace(guide, "guide.whitespace_pattern", params.whitespace_pattern)


def read_prompt(request: InferenceRequest, images: Images) -> tuple[str, bytes]:
    """Return the kind and the bytes of the prompt, as GenerationRequest has them.

    Text becomes one user turn, with the images and videos before it.
    """
    if isinstance(request, inference_pb2.DetokenizeRequest):
        return "token_ids", np.asarray(request.token_ids.ids, "<i8").tobytes()
    kind = request.WhichOneof("prompt")
    if kind == "token_ids" and not isinstance(request, inference_pb2.TokenizeRequest):
        if not request.token_ids.ids:
            raise InvalidRequest("token_ids: empty; send at least one token", stage="gateway")
        return "token_ids", np.asarray(request.token_ids.ids, "<i8").tobytes()
    if kind == "chat" and not isinstance(request, PoolingRequest):
        return "messages", read_chat(request.chat)
    if kind == "raw_text" and not isinstance(request, PoolingRequest):
        return "text", request.raw_text.encode()
    if not request.text and not images:
        raise InvalidRequest("prompt: missing; send text, token_ids or an image", stage="gateway")
    if not images:
        return "messages", encode_messages([{"role": "user", "content": request.text}])
    texts = [{"type": "text", "text": request.text}] if request.text else []
    content = [{"type": item_of(one).kind} for one in images] + texts
    return "messages", encode_messages([{"role": "user", "content": content}])


def fields_set(message: Message) -> dict[str, Any]:
    """Return the fields that the client has set, as Python values by name."""
    return {field.name: plain_value(field, value) for field, value in message.ListFields()}


def plain_value(field: FieldDescriptor, value: Any) -> Any:
    """Return the value of a field as a number, a text, a list or a dictionary."""
    if not field.is_repeated:
        return as_written(value)
    if field.message_type and field.message_type.GetOptions().map_entry:
        return {key: as_written(one) for key, one in value.items()}
    return list(value)


def as_written(value: Any) -> Any:
    """Return the number that the client wrote, for example 0.7 instead of 0.699999988079071.

    A 32-bit float holds the number nearest to it; seven digits are enough to get it back.
    """
    return float(f"{value:.7g}") if isinstance(value, float) else value


# Answers


def whole_response(
    request_id: str, began: Began, pieces: list[Piece], ends: list[Ended]
) -> inference_pb2.GenerateResponse:
    """Return the message of an answer that is not streamed, or of several.

    `pieces` and `ends` are those of all answers, in the order in which they came.
    """
    first, *others = [
        choice_fields([piece for piece in pieces if piece.choice == end.choice], end)
        for end in sorted(ends, key=lambda end: end.choice)
    ]
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        prompt_token_ids=began.prompt_token_ids or (),
        prompt_logprobs=map(prompt_logprob, began.prompt_logprobs or ()),
        usage=usage_message(ends[-1].usage),
        timings=inference_pb2.Timings(**ends[-1].timings),
        more_choices=[inference_pb2.Choice(**fields) for fields in others],
        **first,
    )


def choice_fields(pieces: list[Piece], ended: Ended) -> dict[str, Any]:
    """Return the fields that both Choice and GenerateResponse have."""
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token_id for piece in pieces for token_id in piece.token_ids],
        "logprobs": [token_logprob(entry) for piece in pieces for entry in piece.logprobs],
        "finish_reason": FINISH_REASONS[ended.finish_reason],
        "boxes": box_messages(ended),
        "tool_calls": tool_call_messages(pieces),
    }


def stream_response(
    event: GenerationEvent, request_id: str
) -> inference_pb2.GenerateStreamResponse | None:
    """Return the message of a streamed answer for an event of the core.

    A stream begins once, so there is none for the begin of a further answer.
    """
    match event:
        case Began(choice=choice) if choice:
            return None
        case Began(prompt_token_ids=ids):
            begin = inference_pb2.Begin(
                request_id=request_id,
                prompt_token_ids=ids or (),
                prompt_logprobs=map(prompt_logprob, event.prompt_logprobs or ()),
            )
            return inference_pb2.GenerateStreamResponse(begin=begin)
        case Piece():
            delta = inference_pb2.Delta(
                offset=event.offset,
                token_ids=event.token_ids,
                text=event.text,
                logprobs=map(token_logprob, event.logprobs),
                choice=event.choice,
                tool_calls=tool_call_deltas(event),
            )
            return inference_pb2.GenerateStreamResponse(delta=delta)
        case Ended():
            return inference_pb2.GenerateStreamResponse(end=end_message(event))
        case Result() | Conversion():
            raise AssertionError("a text was asked for")


def end_message(ended: Ended) -> inference_pb2.End:
    return inference_pb2.End(
        finish_reason=FINISH_REASONS[ended.finish_reason],
        usage=usage_message(ended.usage),
        timings=inference_pb2.Timings(**ended.timings),
        boxes=box_messages(ended),
        choice=ended.choice,
    )


def box_messages(ended: Ended) -> list[inference_pb2.Box]:
    """Return the boxes that an answer marks, in pixels of their image."""
    boxes = ended.boxes
    return [box_message(box, boxes.image) for box in boxes.boxes] if boxes else []


def box_message(box: Box, image: int) -> inference_pb2.Box:
    """Return a box in pixels of the image with this index."""
    points = [inference_pb2.Point(x=x, y=y) for x, y in box.corners]
    if len(points) == 4:
        return inference_pb2.Box(ref=box.ref, image=image, quad=inference_pb2.Quad(corners=points))
    (x1, y1), (x2, y2) = box.corners
    rectangle = inference_pb2.Rectangle(x1=x1, y1=y1, x2=x2, y2=y2)
    return inference_pb2.Box(ref=box.ref, image=image, rectangle=rectangle)


def classify_response(
    result: Result, request_id: str, top_k: int | None
) -> inference_pb2.ClassifyResponse:
    """Return the labels of a classification, the best `top_k` or all of them."""
    best = best_classes(result.values, top_k or len(result.labels))
    return inference_pb2.ClassifyResponse(
        request_id=request_id,
        labels=[
            inference_pb2.LabelProbability(
                label=result.labels[n], index=n, probability=result.values[n]
            )
            for n in best
        ],
        num_classes=len(result.labels),
        usage=usage_message(result.usage),
        timings=inference_pb2.Timings(**result.timings),
    )


def embed_response(result: Result, request_id: str) -> inference_pb2.EmbedResponse:
    return inference_pb2.EmbedResponse(
        request_id=request_id,
        values=result.values.tolist(),
        usage=usage_message(result.usage),
        timings=inference_pb2.Timings(**result.timings),
    )


def usage_message(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        image_tokens=usage.image_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def token_logprob(entry: dict[str, Any]) -> inference_pb2.TokenLogprob:
    """Return one entry of Piece.logprobs as a message."""
    top = [inference_pb2.TopLogprob(**token_fields(other)) for other in entry["top_logprobs"]]
    return inference_pb2.TokenLogprob(**token_fields(entry), top=top)


def prompt_logprob(entry: dict[str, Any] | None) -> inference_pb2.PromptLogprob:
    """Return one entry of Began.prompt_logprobs as a message."""
    return inference_pb2.PromptLogprob(logprob=None if entry is None else token_logprob(entry))


def token_fields(entry: dict[str, Any]) -> dict[str, Any]:
    token = entry["token"].encode() if entry.get("bytes") is None else bytes(entry["bytes"])
    return {"token_id": entry["token_id"], "token": token, "logprob": entry["logprob"]}


def tokenize_response(
    found: Conversion, request_id: str, max_model_len: int | None
) -> inference_pb2.TokenizeResponse:
    return inference_pb2.TokenizeResponse(
        request_id=request_id, token_ids=found.token_ids, max_model_len=max_model_len or 0
    )


# Errors


def error_status(error: ServingError) -> status_pb2.Status:
    """Return the error as google.rpc.Status, with an ErrorInfo and perhaps a RetryInfo."""
    metadata = {"stage": error.stage} if error.stage else {}
    if error.item is not None:
        metadata["image"] = str(error.item)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.code, domain="twinlens", metadata=metadata)
    ]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.grpc_code),
        message=shorten(error.message, MAX_ERROR_CHARS),
        details=packed(details),
    )


def packed(details: Sequence[Message]) -> list[any_pb2.Any]:
    boxes = [any_pb2.Any() for _ in details]
    for box, detail in zip(boxes, details, strict=True):
        box.Pack(detail)
    return boxes
