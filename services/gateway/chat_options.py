"""How a request has the chat template make its prompt, for both APIs."""

from collections.abc import Sequence
from typing import Any

import msgspec

from common.chat import ChatOptions
from services.gateway.invalid_field import InvalidField


def make_chat_options(
    tools: Sequence[dict[str, Any]],
    last_role: str,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, Any] | None,
) -> bytes:
    """Return the options in the form of GenerationRequest.chat_options.

    None stands for a field that is absent. By default the prompt ends where the assistant begins to
    speak, unless the answer continues the last message, which has the role `last_role`.

    Raises
    ------
    InvalidField
        if the answer cannot continue the last message.
    """
    if continue_final_message:
        if add_generation_prompt:
            raise InvalidField(
                "add_generation_prompt", "must be false with continue_final_message: true"
            )
        if last_role != "assistant":
            raise InvalidField(
                "continue_final_message", "the last message must be one of the assistant"
            )
    options = ChatOptions(
        tools=list(tools),
        add_generation_prompt=add_generation_prompt is not False and not continue_final_message,
        continue_final_message=bool(continue_final_message),
        template_kwargs=template_kwargs or {},
    )
    return b"" if options == ChatOptions() else msgspec.json.encode(options)
