"""The checkpoint's own chat template, which turns messages into the prompt's text."""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import msgspec
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.chat import ROLES, ChatOptions
from common.checkpoint import BadCheckpoint
from common.errors import InvalidRequest, shorten
from common.model_files import read_file, read_optional_json
from services.preprocess.prompts import Piece
from services.preprocess.typed_tokens import (
    UserText,
    as_user_text,
    has_any,
    unused_marks,
    written,
)

TEMPLATE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the expressions of a template may raise."""
TOO_COSTLY = (
    "the model's chat template takes too much time or memory for these messages: send fewer, or "
    "correct the template in the model directory"
)
MAX_TEMPLATE_BYTES = 2**20
RESERVED_VARIABLES = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
WRITING_FILTERS = ("striptags", "title", "urlencode", "urlize", "wordwrap")
"""Filters of jinja2 that take texts apart in other ways than by the methods of a text."""
WRITING_METHODS = ("center", "join", "ljust", "replace", "rjust", "translate")
"""Methods of a text that put other texts into it."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class CalledFunction(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = {}


class Call(msgspec.Struct):
    """A call of a tool, as templates read it."""

    function: CalledFunction
    id: str = ""
    type: str = "function"


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox of a template, in which users' texts stay users' texts."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        for name in WRITING_FILTERS:
            self.filters[name] = on_written(self.filters[name])
        self.filters["tojson"] = to_json
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}

    def call(self, context: Context, called: Any, /, *arguments: Any, **named: Any) -> Any:
        if getattr(called, "__name__", "") in WRITING_METHODS:
            owner = getattr(called, "__self__", None)
            if isinstance(owner, str) and not isinstance(owner, UserText):
                arguments = tuple(map(written_all, arguments))
        return super().call(context, called, *arguments, **named)


class ChatTemplate:
    """A compiled template.

    It runs in a sandbox: a checkpoint comes from elsewhere and must not run code here.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = Environment()
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise BadCheckpoint(
                f"the chat template cannot be compiled: line {e.lineno}: {e.message}"
            ) from e
        except (MemoryError, SyntaxError, *TEMPLATE_ERRORS) as e:
            # Constant expressions are computed, and may be of any size. Blocks become blocks of
            # Python, which allows only a few inside each other.
            raise BadCheckpoint(f"the chat template cannot be compiled: {type(e).__name__}") from e
        self.special_tokens = special_tokens
        syntax = environment.parse(source)
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(syntax)
        """Whether the template says the tools of a request."""

    def render(self, messages: list[dict[str, Any]], options: ChatOptions = ChatOptions()) -> str:
        """Return the prompt of a conversation.

        Raises InvalidRequest if the template refuses the messages, which are those of `normalise`.
        """
        variables = options.template_kwargs | self.special_tokens
        # Without tools the variable is None, as transformers has it.
        variables |= {"messages": messages, "tools": options.tools or None}
        variables["add_generation_prompt"] = (
            options.add_generation_prompt and not options.continue_final_message
        )
        try:
            return self.template.render(**variables)
        except jinja2.TemplateError as e:
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {shorten(e.message or '')}"
            ) from e
        except MemoryError as e:
            raise InvalidRequest(TOO_COSTLY) from e
        except TEMPLATE_ERRORS as e:
            raise InvalidRequest(
                f"the model's chat template fails with these messages ({type(e).__name__}): "
                "send others, or correct the template in the model directory"
            ) from e

    def prompt(
        self, messages: list[dict[str, Any]], options: ChatOptions, first_characters: str
    ) -> Piece:
        """Return the prompt of a conversation, in which no user can have written a token.

        Parameters
        ----------
        messages
            are those of `normalise`.
        first_characters
            are those that names of tokens begin with.

        Raises
        ------
        InvalidRequest
            if the template refuses the messages.
        """
        reserved = self.special_tokens.keys() | RESERVED_VARIABLES
        if names := reserved & options.template_kwargs.keys():
            raise InvalidRequest(
                f"chat_template_kwargs.{min(names)}: the server sets this variable"
            )
        given = [messages, options.tools, options.template_kwargs]
        is_marked = has_any(given, first_characters)
        if not (is_marked or options.continue_final_message):
            return Piece(self.render(messages, options))
        mark, end, *_ = unused_marks(given)
        if options.continue_final_message:
            given[0] = messages = [*messages[:-1], with_end(messages[-1], end)]
        if is_marked:
            messages, tools, variables = as_user_text(given, first_characters, mark)
            options = msgspec.structs.replace(options, tools=tools, template_kwargs=variables)
        text = self.render(messages, options)
        if options.continue_final_message:
            text = cut_off(text, end)
        return Piece(text, mark=mark if is_marked else "")


def with_end(message: dict[str, Any], end: str) -> dict[str, Any]:
    """Return the last message of a conversation, whose text ends with a mark."""
    if message["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message: the last message must be one of the assistant"
        )
    content = message["content"]
    if isinstance(content, str):
        return message | {"content": content + end}
    last = content[-1] if content else {}
    if last.get("type") != "text":
        raise InvalidRequest("continue_final_message: the last message must end with a text")
    return message | {"content": [*content[:-1], last | {"text": last["text"] + end}]}


def cut_off(text: str, end: str) -> str:
    """Return the text before its only end mark."""
    before, found, after = text.partition(end)
    if not found or end in after:
        raise InvalidRequest(
            "continue_final_message: the model's chat template does not say the last message as it "
            "is; leave the field out"
        )
    return before


def load(path: Path) -> ChatTemplate:
    """Read the template of a model directory.

    It is in chat_template.jinja, chat_template.json or tokenizer_config.json; the first one counts.
    Raises BadCheckpoint if there is none, or it cannot be compiled.
    """
    tokenizer_config = read_optional_json(path / "tokenizer_config.json")
    source = find_source(path, tokenizer_config)
    if source is None:
        raise BadCheckpoint(
            f"{path} has no chat template: put chat_template.jinja, chat_template.json or "
            "tokenizer_config.json with one there"
        )
    if len(source) > MAX_TEMPLATE_BYTES:
        raise BadCheckpoint(f"{path}: the chat template is larger than {MAX_TEMPLATE_BYTES} bytes")
    return ChatTemplate(source, special_tokens(path, tokenizer_config))


def special_tokens(path: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that templates may name, where each is a text or an object."""
    named = {name: tokenizer_config.get(name) for name in SPECIAL_TOKENS}
    tokens = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            raise BadCheckpoint(f"{path}/tokenizer_config.json: {name} is not a text")
        if text:
            tokens[name] = text
    return tokens


def find_source(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """Return the text of the template, if there is one."""
    if (file := path / "chat_template.jinja").exists():
        return decoded(file)
    own_file = read_optional_json(path / "chat_template.json")
    found = own_file.get("chat_template") or tokenizer_config.get("chat_template")
    if isinstance(found, list):  # several named templates
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise BadCheckpoint(f"{path}: chat_template is not a text")
    return found


def decoded(file: Path) -> str:
    """Return a text file. Raises BadCheckpoint if it is not UTF-8, or too large."""
    try:
        return read_file(file, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as e:
        raise BadCheckpoint(f"{file} is not UTF-8 text") from e


def normalise(messages: Any) -> list[dict[str, Any]]:
    """Return messages with only what templates may rely on.

    That is a known role, and content that is text or a list of texts, images and videos. Raises
    InvalidRequest if they are malformed.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message")
    return [normalise_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def normalise_message(message: Any, where: str) -> dict[str, Any]:
    match message:
        case {"role": str(role), **rest} if role in ROLES:
            pass
        case _:
            raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}")
    match rest.get("content"):
        case None:
            content: Any = ""
        case str(content):
            pass
        case [*parts]:
            content = [
                normalise_part(part, f"{where}.content[{i}]") for i, part in enumerate(parts)
            ]
        case _:
            raise InvalidRequest(f"{where}.content must be text or a list of parts")
    found = {"role": ROLES[role], "content": content}
    if isinstance(call_id := rest.get("tool_call_id"), str):
        found["tool_call_id"] = call_id
    if calls := rest.get("tool_calls"):
        found["tool_calls"] = normalise_calls(calls, f"{where}.tool_calls")
    return found


def normalise_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls of tools in OpenAI's form, whose arguments are an object."""
    try:
        return msgspec.to_builtins(msgspec.convert(calls, list[Call]))
    except msgspec.ValidationError as e:
        raise InvalidRequest(f"{where}: {e}") from e


def normalise_part(part: Any, where: str) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image" | "video" as kind}:
            return {"type": kind}
    raise InvalidRequest(f"{where} must be a text, an image or a video")


def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Format a value as JSON. Unlike jinja2's own filter, it does not escape for HTML.

    `options` are those of json.dumps, some of which templates give.
    """
    return json.dumps(written(value), **({"ensure_ascii": False} | options), indent=indent)


def on_written(filter: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter for users' texts as they are written."""

    @wraps(filter)
    def call(*arguments: Any, **named: Any) -> Any:
        return filter(*map(written, arguments), **named)

    return call


def written_all(value: Any) -> Any:
    """Return a value, or all of an iterable, with users' texts as they are written."""
    is_one = isinstance(value, str | dict) or not isinstance(value, Iterable)
    return written(value if is_one else list(value))


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(str(format))
