"""What the gateway and preprocess both know about chat messages."""

from typing import Any

import msgspec

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""The roles that a message may have, and the role that the chat template sees for each.

"developer" is a later name of "system", which chat templates do not know.
"""


class ChatOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How the chat template makes a prompt of messages."""

    tools: list[dict[str, Any]] = []
    """The tools that the model may call, in OpenAI's form: {"type": "function", "function": ...}.
    """
    add_generation_prompt: bool = True
    """Whether the prompt ends where the assistant begins to speak."""
    continue_final_message: bool = False
    """Whether the answer continues the last message."""
    template_kwargs: dict[str, Any] = {}
    """More variables for the template."""
