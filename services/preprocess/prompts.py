"""A prompt before it is tokenized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from common.chat import ChatOptions
from common.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that is tokenized by itself."""

    text: str
    special_tokens: frozenset[str] | None = None
    """The special tokens that the text may name; None for all of them. The names of the others are
    tokenized like any text, so that a user cannot write them."""
    continues: bool = False
    """Whether the text continues a line, so that no space is put in front of it. Some SentencePiece
    models do that to each text."""
    mark: str = ""
    """A character that stands in what users wrote where it could spell a token's name. It is not
    part of the text. Names of tokens that it is not in are tokens, of all kinds."""


PromptParts: TypeAlias = Sequence[Piece | int]
"""Pieces of text, and token ids that are taken as they are."""
ChatPrompt: TypeAlias = Callable[[list[dict[str, Any]], ChatOptions], PromptParts]
"""Makes a prompt of chat messages. The options have neither tools nor variables of a template.

A message is {"role": str, "content": str or a list of parts}, with the roles that `common/chat.py`
gives to templates. A part is {"type": "text", "text": str}, or an item, {"type": <its kind>}. It
raises InvalidRequest if the family cannot say the messages.
"""
FitPrompt: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Makes of the tokens of a prompt, int64 [n], as many as the model takes: int64 [m]."""


def check_continued(messages: list[dict[str, Any]], options: ChatOptions) -> None:
    """Raise InvalidRequest if the answer should continue a message that is not the assistant's."""
    if options.continue_final_message and messages[-1]["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message: the last message must be one of the assistant"
        )


def refuse_options(options: ChatOptions) -> None:
    """Raise InvalidRequest if a conversation should not end where the assistant begins to speak."""
    for name, is_given in (
        ("add_generation_prompt", not options.add_generation_prompt),
        ("continue_final_message", options.continue_final_message),
    ):
        if is_given:
            raise InvalidRequest(f"{name}: this model knows no turns; leave it out")


def num_chars(parts: PromptParts) -> int:
    """Return the number of characters to be tokenized."""
    return sum(len(part.text) for part in parts if isinstance(part, Piece))
