"""The messages of a chat, and their translation to what a chat template takes."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from common.chat import ROLES
from services.gateway.image_parts import read_image
from services.gateway.images import check_item_count
from services.gateway.invalid_field import BeyondContext, InvalidField
from services.gateway.limits import MAX_MESSAGES, MAX_TOKEN_BYTES
from services.gateway.pixel_bounds import ABOUT_CACHES, refuse_unknown
from services.gateway.tool_messages import read_tool_fields
from services.gateway.unsupported import (
    IN_MESSAGE,
    NEUTRAL_IN_MESSAGE,
    refuse_extra,
    refuse_unsupported,
)
from services.gateway.videos import Media, read_video

IN_TEXT_PART = ("type", "text", "annotations", *ABOUT_CACHES)
"""The keys of a part of text that are accepted."""
IN_REFUSAL_PART = ("type", "refusal", *ABOUT_CACHES)


class Body(BaseModel):
    """A JSON object that may have more fields than those declared."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class ChatMessage(Body):
    role: str
    content: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


def check_message_count(messages: list[ChatMessage]) -> None:
    """Raise InvalidField if there are too many messages and parts of messages."""
    parts = sum(len(message.content) for message in messages if isinstance(message.content, list))
    if len(messages) + parts > MAX_MESSAGES:
        raise InvalidField(
            "messages", f"more than {MAX_MESSAGES} messages and parts are not accepted; send fewer"
        )


def check_text_length(
    messages: list[dict[str, Any]], max_model_len: int | None, name: str = "messages"
) -> None:
    """Raise BeyondContext if the messages' text cannot fit, whatever its tokens.

    `name` is that of the field that has the text.
    """
    if max_model_len is None:
        return
    num_chars = 0
    for message in messages:
        match message["content"]:
            case str(text):
                num_chars += len(text)
            case parts:
                num_chars += sum(len(part.get("text", "")) for part in parts)
    if num_chars > max_model_len * MAX_TOKEN_BYTES:
        problem = f"The messages have {num_chars} characters, which do not fit: send less text."
        raise BeyondContext(name, max_model_len, problem)


def encode_messages(messages: list[dict[str, Any]]) -> bytes:
    """Return chat messages in the form of GenerationRequest.prompt."""
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode()


def read_message(message: ChatMessage, path: str, images: list[Media]) -> dict[str, Any]:
    """Return the message in the form of a chat template, and append its images and videos to
    `images`.

    `path` names the message in errors.
    """
    if message.role not in ROLES:
        raise InvalidField(
            f"{path}.role",
            f"{message.role[:40]!r} is not supported; use {', '.join(ROLES)}",
        )
    check_fields(message, path)
    content = read_content(message, path, images)
    tool_fields = read_tool_fields(message.role, message.tool_calls, message.tool_call_id, path)
    return {"role": ROLES[message.role], "content": content} | tool_fields


def check_fields(message: ChatMessage, path: str) -> None:
    """Raise InvalidField if a message has a key that is not known, or not supported."""
    given = message.model_extra or {}
    refuse_unsupported(given, IN_MESSAGE, f"{path}.")
    refuse_extra(message, path, (*NEUTRAL_IN_MESSAGE, *IN_MESSAGE))
    if not isinstance(given.get("name"), str | None):
        raise InvalidField(f"{path}.name", "must be a text")
    if message.role == "assistant" and not isinstance(given.get("refusal"), str | None):
        raise InvalidField(f"{path}.refusal", "must be a text, or null")


def read_content(
    message: ChatMessage, path: str, images: list[Media]
) -> str | list[dict[str, str]]:
    match message.content:
        case None if message.role == "assistant":
            return (message.model_extra or {}).get("refusal") or ""
        case None:
            return ""
        case str(text):
            return text
        case list(parts):
            return [
                read_part(part, message.role, f"{path}.content[{n}]", images)
                for n, part in enumerate(parts)
            ]
    raise InvalidField(f"{path}.content", "must be a string, a list of parts, or null")


def read_part(part: Any, role: str, path: str, images: list[Media]) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            refuse_unknown(part, IN_TEXT_PART, path)
            return {"type": "text", "text": text}
        case {"type": "refusal", "refusal": str(text)} if role == "assistant":
            refuse_unknown(part, IN_REFUSAL_PART, path)
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": str() | {"url": str()}}:
            check_role("an image", role, path)
            check_item_count(len(images) + 1)
            images.append(read_image(part, path, len(images)))
            return {"type": "image"}
        case {"type": "video" | "video_url"}:
            check_role("a video", role, path)
            images.append(read_video(part, path, images))
            return {"type": "video"}
        case {"type": "text"}:
            raise InvalidField(f"{path}.text", "must be a string")
        case {"type": "image_url"}:
            raise InvalidField(f"{path}.image_url", "must be an object with a url, or a string")
        case {"type": str(kind)}:
            raise InvalidField(
                f"{path}.type",
                f"{kind[:40]!r} is not supported; send text, image_url, video and video_url parts",
            )
    raise InvalidField(path, "must be an object with a type, such as text or image_url")


def check_role(what: str, role: str, path: str) -> None:
    """Raise InvalidField if a message of this role may not have an image or a video."""
    if role not in ("user", "tool"):
        problem = f"{what} is not allowed in a message of role {role!r}"
        raise InvalidField(path, f"{problem}; send it in a user message")
