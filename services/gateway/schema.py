"""The body of a chat completion, and its translation to a GenerationRequest."""

import re
import uuid
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from common.messages import MAX_CHOICES, MAX_PRIORITY, MIN_PRIORITY, Sampling, Stopping
from services.gateway.chat_messages import (
    Body,
    ChatMessage,
    check_message_count,
    check_text_length,
    encode_messages,
    read_message,
)
from services.gateway.chat_options import make_chat_options
from services.gateway.choices import read_n
from services.gateway.generation import GenerationRequest
from services.gateway.guides import Guided
from services.gateway.image_parts import bounded
from services.gateway.invalid_field import InvalidField, explain_body_error
from services.gateway.json_bodies import read_body
from services.gateway.parameters import make_sampling, make_stopping
from services.gateway.repetition import RepetitionDetection, make_repetition
from services.gateway.token_rules import make_token_rules, read_ngram_size
from services.gateway.tools import MAX_TOOLS, Tool, ToolUse, read_tool_use
from services.gateway.unsupported import IN_REQUEST, obey_aliases, refuse_extra, refuse_unsupported
from services.gateway.videos import Media

MAX_TIMEOUT = 1e9
"""The longest deadline of a request, in seconds."""
REQUEST_ID = re.compile(r"[!-~]{1,128}")

SAMPLING_FIELDS = {
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
}
STOPPING_FIELDS = {"min_tokens", "ignore_eos", "stop", "stop_token_ids", "skip_special_tokens"}


def one_or_many(stop: Any) -> Any:
    """Return a single stop string as a list."""
    return [stop] if isinstance(stop, str) else stop


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Whether every chunk has the usage so far."""
    include_obfuscation: bool | None = None
    """Asks for random padding against an observer of the network. There is none."""


class ChatRequest(Guided):
    """The body of a chat completion.

    The ranges of sampling and stopping values are checked by `parameters.py`.
    """

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
    stop: Annotated[list[str], BeforeValidator(one_or_many)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    timings: bool | None = None
    """Whether a stream ends with the stage timings. An answer as a whole always has them."""
    token_timestamps: bool | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = None
    priority: int | None = Field(None, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    no_repeat_ngram_size: int | None = None
    vllm_xargs: dict[str, Any] | None = None
    include_stop_str_in_output: bool | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    repetition_detection: RepetitionDetection | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)

    @cached_property
    def tool_use(self) -> ToolUse:
        """What the request asks for of tools. Raises InvalidField if that does not fit together."""
        return read_tool_use(self.tools or [], self.tool_choice, self.parallel_tool_calls)

    add_generation_prompt: bool | None = None
    """None for true, unless the answer continues the last message."""
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_running_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self) -> Sampling:
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs", "requires logprobs: true")
        values = self.model_dump(include=SAMPLING_FIELDS)
        values["top_k"] = 0 if self.top_k == -1 else self.top_k
        values["num_logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        values["num_prompt_logprobs"] = self.prompt_logprobs
        return make_sampling(values)

    def stopping(self, max_model_len: int | None) -> Stopping:
        """Return when the answer ends. `max_completion_tokens` has priority over `max_tokens`."""
        values = self.model_dump(include=STOPPING_FIELDS)
        values["include_stop"] = self.include_stop_str_in_output
        loops = self.repetition_detection
        values["repetition"] = make_repetition(loops.model_dump() if loops else None)
        if self.max_completion_tokens is None:
            values["max_tokens"] = self.max_tokens
            return make_stopping(values, max_model_len)
        values["max_tokens"] = self.max_completion_tokens
        return make_stopping(values, max_model_len, "max_completion_tokens")


def new_request_id(wanted: str | None) -> str:
    """Return the client's own id if logs and headers can carry it unchanged, else a new one."""
    return wanted if wanted and REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex


def parse_chat(body: bytes | bytearray) -> ChatRequest:
    """Return the body as a ChatRequest.

    Raises
    ------
    InvalidRequest
        if the body is malformed, or asks for something that is not supported.
    """
    chat = read_body(body, ChatRequest)
    return checked_chat(chat)


def read_chat(values: dict[str, Any]) -> ChatRequest:
    """Return a chat with these fields, as `parse_chat` does."""
    try:
        chat = ChatRequest.model_validate(values)
    except ValidationError as error:
        raise explain_body_error(error) from None
    return checked_chat(chat)


def checked_chat(chat: ChatRequest) -> ChatRequest:
    check_message_count(chat.messages)
    obey_aliases(chat)
    refuse_unsupported(chat.model_extra or {}, IN_REQUEST)
    check_stream_options(chat.stream_options, chat.stream)
    return chat


def check_stream_options(options: StreamOptions | None, stream: bool | None) -> None:
    """Raise InvalidField if a body that wants no stream says how it wants it, as OpenAI does."""
    if options is None:
        return
    refuse_extra(options, "stream_options")
    if not stream:
        raise InvalidField("stream_options", "is allowed with stream: true only")


def chat_to_generation(
    chat: ChatRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> GenerationRequest:
    """Return the chat as a GenerationRequest, or raise InvalidRequest if a value is wrong."""
    sampling = chat.sampling()
    stopping = chat.stopping(max_model_len)
    images: list[Media] = []
    messages = [
        read_message(message, f"messages[{n}]", images) for n, message in enumerate(chat.messages)
    ]
    check_text_length(messages, max_model_len)
    guide = chat.guide()
    tool_use = chat.tool_use
    guide_kind, guide_text = tool_use.guide_with(guide.kind, guide.text)
    return GenerationRequest(
        request_id=request_id,
        prompt_kind="messages",
        prompt=encode_messages(messages),
        images=bounded(images, chat.mm_processor_kwargs),
        sampling=sampling,
        stopping=stopping,
        timeout=timeout,
        return_prompt_token_ids=bool(chat.return_token_ids),
        guide_kind=guide_kind,
        guide=guide_text,
        guide_whitespace=guide.whitespace,
        chat_options=make_chat_options(
            tool_use.tools,
            chat.messages[-1].role,
            chat.add_generation_prompt,
            chat.continue_final_message,
            chat.chat_template_kwargs,
        ),
        reads_tool_calls=bool(tool_use.tools),
        n=read_n(chat),
        priority=chat.priority or 0,
        token_rules=make_token_rules(
            chat.logit_bias,
            chat.allowed_token_ids,
            chat.bad_words,
            read_ngram_size(chat.no_repeat_ngram_size, chat.vllm_xargs),
        ),
    )
