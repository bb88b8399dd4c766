"""A prompt before it is tokenized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np


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
ChatPrompt: TypeAlias = Callable[[list[dict[str, Any]]], PromptParts]
"""Makes a prompt of chat messages, up to where the assistant begins to speak.

A message is {"role": str, "content": str or a list of parts}, with the roles that `common/chat.py`
gives to templates. A part is {"type": "text", "text": str}, or an item, {"type": <its kind>}. It
raises InvalidRequest if the family cannot say the messages.
"""
FitPrompt: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Makes of the tokens of a prompt, int64 [n], as many as the model takes: int64 [m]."""


def num_chars(parts: PromptParts) -> int:
    """Return the number of characters to be tokenized."""
    return sum(len(part.text) for part in parts if isinstance(part, Piece))
