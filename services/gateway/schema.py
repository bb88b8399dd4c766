"""What the two doors accept: shapes, limits, and the translation to a GenerationRequest."""

import binascii
import json
import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from common.chat import ROLES
from common.errors import InvalidRequest, TooLarge, UnreadableImage
from common.messages import Sampling, Stopping
from services.gateway.generation import GenerationRequest
from services.gateway.unsupported import IN_MESSAGE, IN_REQUEST

MAX_IMAGES = 32
MAX_IMAGE_BYTES = 20 * 10**6
MAX_SEED = 2**63 - 1
MAX_TIMEOUT = 1e9
REQUEST_ID = re.compile(r"[!-~]{1,128}")

StructT = TypeVar("StructT", Sampling, Stopping)


class InvalidField(InvalidRequest):
    """An InvalidRequest that knows the field it is about."""

    code = "InvalidRequest"

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}", stage="gateway")
        self.param = param


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class ChatMessage(Body):
    role: str
    content: Any = None


class StreamOptions(Body):
    include_usage: bool | None = None


class ResponseFormat(Body):
    type: str
    json_schema: dict[str, Any] | None = None

    def guide(self) -> tuple[str, str]:
        """The kind of the guide and its text; both empty for plain text."""
        match self.type:
            case "text":
                return "", ""
            case "json_object":
                return "json_object", ""
            case "json_schema":
                schema = (self.json_schema or {}).get("schema")
                if not isinstance(schema, dict):
                    raise InvalidField(
                        "response_format.json_schema.schema", "must be a JSON schema (an object)"
                    )
                return "json_schema", json.dumps(schema)
        raise InvalidField(
            "response_format.type", "this is not supported; use text, json_object or json_schema"
        )


class ChatRequest(Body):
    """A chat completion's body. The ranges of sampling and stopping values are those of
    common.messages."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, le=2**31)
    max_completion_tokens: int | None = Field(None, le=2**31)
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: (
        Annotated[
            list[str], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
        ]
        | None
    ) = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs", "needs logprobs: true beside it")
        names = (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
        )
        top_k = 0 if self.top_k == -1 else self.top_k
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return make_sampling(
            {**self.model_dump(include=set(names)), "top_k": top_k, "num_logprobs": num_logprobs}
        )

    def stopping(self, max_model_len: int | None) -> Stopping:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = ("min_tokens", "ignore_eos", "stop", "stop_token_ids", "skip_special_tokens")
        values = {**self.model_dump(include=set(names)), "max_tokens": getattr(self, limit)}
        return make_stopping(values, max_model_len, limit)


def new_request_id(wanted: str | None) -> str:
    """The client's own id where it can go through logs and headers as it is."""
    return wanted if wanted and REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex


def parse_chat(body: bytes | bytearray) -> ChatRequest:
    """The body as a ChatRequest that asks for nothing we would have to ignore."""
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise explained(error) from None
    refuse_unsupported(chat.model_extra or {}, IN_REQUEST)
    return chat


def explained(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's complaints in one sentence; the input itself is not repeated."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(
            f"the body is not JSON that can be read: {first['ctx']['error']}", stage="gateway"
        )
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object", stage="gateway")
    path = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]
    ).lstrip(".")
    return InvalidField(path, lower_first(first["msg"]))


def lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def refuse_unsupported(
    given: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]], where: str = ""
) -> None:
    for name in unsupported.keys() & given.keys():
        neutral = unsupported[name]
        if given[name] is not None and given[name] not in neutral:
            allowed = f"; only {json.dumps(neutral[0])} is" if neutral else ""
            raise InvalidField(where + name, f"this is not supported{allowed}; leave it out")


def chat_to_generation(
    chat: ChatRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> GenerationRequest:
    sampling = chat.sampling()
    stopping = chat.stopping(max_model_len)
    images: list[bytes] = []
    messages = [
        read_message(message, f"messages[{n}]", images) for n, message in enumerate(chat.messages)
    ]
    guide_kind, guide = chat.response_format.guide() if chat.response_format else ("", "")
    return GenerationRequest(
        request_id=request_id,
        prompt_kind="messages",
        prompt=messages_prompt(messages),
        images=tuple(images),
        sampling=sampling,
        stopping=stopping,
        timeout=timeout,
        return_prompt_token_ids=bool(chat.return_token_ids),
        guide_kind=guide_kind,
        guide=guide,
    )


def messages_prompt(messages: list[dict[str, Any]]) -> bytes:
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode()


def read_message(message: ChatMessage, where: str, images: list[bytes]) -> dict[str, Any]:
    """The message as a chat template takes it; its images are appended to `images`."""
    if message.role not in ROLES:
        raise InvalidField(
            f"{where}.role", f"{message.role[:40]!r} is not supported; use {', '.join(ROLES)}"
        )
    refuse_unsupported(message.model_extra or {}, IN_MESSAGE, f"{where}.")
    return {"role": ROLES[message.role], "content": read_content(message, where, images)}


def read_content(
    message: ChatMessage, where: str, images: list[bytes]
) -> str | list[dict[str, str]]:
    match message.content:
        case None:
            return ""
        case str(text):
            return text
        case list(parts):
            return [
                read_part(part, message.role, f"{where}.content[{n}]", images)
                for n, part in enumerate(parts)
            ]
    raise InvalidField(f"{where}.content", "must be a string, a list of parts, or null")


def read_part(part: Any, role: str, where: str, images: list[bytes]) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": str(url) | {"url": str(url)}}:
            if role != "user":
                raise InvalidField(
                    where,
                    f"an image is not allowed in a message of role {role!r}; send it in a user "
                    "message",
                )
            check_image_count(len(images) + 1)
            images.append(read_data_uri(url, f"{where}.image_url", len(images)))
            return {"type": "image"}
        case {"type": "text" | "image_url" as kind}:
            raise InvalidField(
                f"{where}.{kind}",
                "must be a string"
                if kind == "text"
                else "must be an object with a url, or a string",
            )
        case {"type": str(kind)}:
            raise InvalidField(
                f"{where}.type", f"{kind[:40]!r} is not supported; send text and image_url parts"
            )
    raise InvalidField(where, "must be an object with a type, such as text or image_url")


def read_data_uri(url: str, where: str, index: int) -> bytes:
    scheme = url[:20].partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise InvalidField(where, "by-URL images are not enabled; send a data: URI")
    if scheme != "data":
        raise InvalidField(where, "only images inside the request are accepted; send a data: URI")
    # The comma is looked for near the start: a payload without one may be megabytes long.
    head, comma, _ = url[:1000].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidField(where, "a data: URI must read data:<type>;base64,<the file in base64>")
    if len(url) * 3 // 4 > MAX_IMAGE_BYTES + 1000:
        raise image_too_large(index)
    try:
        image = binascii.a2b_base64(url[len(head) + 1 :], strict_mode=True)
    except ValueError:
        raise InvalidField(where, "what follows ;base64, is not valid base64") from None
    check_image(image, index)
    return image


def check_images(images: Sequence[bytes]) -> None:
    check_image_count(len(images))
    for index, image in enumerate(images):
        check_image(image, index)


def check_image_count(count: int) -> None:
    if count > MAX_IMAGES:
        raise TooLarge(f"more than {MAX_IMAGES} images in one request; send fewer", stage="gateway")


def check_image(image: bytes, index: int) -> None:
    if not image:
        raise UnreadableImage(f"image {index} is empty", stage="gateway", item=index)
    if len(image) > MAX_IMAGE_BYTES:
        raise image_too_large(index)


def image_too_large(index: int) -> TooLarge:
    return TooLarge(
        f"image {index} is larger than {MAX_IMAGE_BYTES // 10**6} MB; send a smaller file",
        stage="gateway",
        item=index,
    )


def make_sampling(values: Mapping[str, Any]) -> Sampling:
    """Values that are None take the model's default. A missing seed is drawn, so that the answer
    can be made again; of any seed the low 63 bits count, which is what the wire carries."""
    seed = values.get("seed")
    return convert(
        {**values, "seed": (secrets.randbits(63) if seed is None else seed) & MAX_SEED}, Sampling
    )


def make_stopping(
    values: Mapping[str, Any], max_model_len: int | None, limit: str = "max_tokens"
) -> Stopping:
    """`limit` is the name under which the client sent max_tokens."""
    stopping = convert(values, Stopping, {"max_tokens": limit})
    if stopping.max_tokens is not None:
        if max_model_len is not None and stopping.max_tokens > max_model_len:
            raise InvalidField(
                limit,
                f"{stopping.max_tokens} is beyond the context of {max_model_len} tokens; ask for "
                "fewer",
            )
        if stopping.min_tokens > stopping.max_tokens:
            raise InvalidField(
                "min_tokens",
                f"{stopping.min_tokens} is more than {limit}, which is {stopping.max_tokens}",
            )
    return stopping


def convert(
    values: Mapping[str, Any], kind: type[StructT], names: Mapping[str, str] = {}
) -> StructT:
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).rstrip("`").partition(" - at `$.")
        got = f", got {given[path]}" if isinstance(given.get(path), int | float) else ""
        raise InvalidField(
            names.get(path, path), lower_first(problem).replace("`", "") + got
        ) from None
