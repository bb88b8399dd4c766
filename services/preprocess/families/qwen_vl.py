"""Qwen-VL: images of one size, prompts in ChatML or raw, and dynamic NTK."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.chat import ChatOptions
from common.checkpoint import Checkpoint
from common.errors import InvalidRequest, TooLarge
from common.families import qwen_vl as family_rules
from common.families.qwen_vl import (
    IMAGE_MARKERS,
    IMAGE_PLACEHOLDER,
    MARKUP_TOKENS,
    NUM_IMAGE_TOKENS,
    TURN_MARKERS,
)
from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.preprocess.families.limits import ItemLimits, check_bounds
from services.preprocess.families.patches import square_item
from services.preprocess.prepared import PreparedItem, ReadyItem
from services.preprocess.prompts import (
    ChatPrompt,
    Piece,
    PromptParts,
    check_continued,
    refuse_options,
)

DEFAULT_SYSTEM = "You are a helpful assistant."
NO_TOKENS = frozenset[str]()
MARKUP = frozenset(MARKUP_TOKENS)
"""The special tokens that messages may name."""


class QwenVLRules:
    """The rules of Qwen-VL for one checkpoint. They do not change."""

    whole = False
    fit_prompt = None

    def __init__(self, checkpoint: Checkpoint, limits: ItemLimits) -> None:
        """Read the checkpoint's settings. Raises ValueError if the limits cannot be kept."""
        self.fingerprint = checkpoint.fingerprint
        self.patch_size = family_rules.patch_size(checkpoint)
        self.side = family_rules.image_size(checkpoint)
        self.seq_length = family_rules.seq_length(checkpoint)
        self.has_dynamic_ntk = bool(checkpoint.config.get("use_dynamic_ntk"))
        self.chat_prompt = chat_prompt_of(checkpoint)
        limits.check_square(self.side)

    def fitting_size(
        self, height: int, width: int, max_patches: int, bounds: PixelBounds = NO_BOUNDS
    ) -> tuple[int, int]:
        check_bounds(bounds, self.side, self.side)
        num_patches = (self.side // self.patch_size) ** 2
        if max_patches and num_patches > max_patches:
            raise TooLarge(
                f"any image of this model has {num_patches} patches, the vision replicas take at "
                f"most {max_patches}: give --vision-buckets {num_patches}"
            )
        return self.side, self.side

    def num_tokens(self, height: int, width: int) -> int:
        return NUM_IMAGE_TOKENS

    def prepare_item(self, kind: ItemKind, pixels: np.ndarray) -> ReadyItem:
        return square_item(self.fingerprint, kind, pixels, self.patch_size, NUM_IMAGE_TOKENS)

    def positions(
        self, num_tokens: int, offsets: list[int], items: list[PreparedItem]
    ) -> tuple[np.ndarray, int]:
        return np.arange(num_tokens, dtype=np.int64)[None], 0

    def rope_parameter(self, num_tokens: int) -> int:
        return ntk_alpha(num_tokens, self.seq_length) if self.has_dynamic_ntk else 0


def ntk_alpha(num_tokens: int, seq_length: int) -> int:
    """Return the factor of the rotary base for a prompt.

    It is 1 up to `seq_length` tokens, 3 up to twice as many, 7 up to four times as many, and so on.
    """
    return max(1, 2 ** math.ceil(math.log2(num_tokens / seq_length) + 1) - 1)


def chat_prompt_of(checkpoint: Checkpoint) -> ChatPrompt:
    """Return what makes prompts in the checkpoint's chat format."""
    markers = (*TURN_MARKERS, IMAGE_MARKERS[0], IMAGE_PLACEHOLDER, IMAGE_MARKERS[1])
    ids = [family_rules.token_id(checkpoint, marker) for marker in markers]
    begin_turn, end_turn = ids[:2]
    image = ids[2:]
    if family_rules.chat_format(checkpoint) == "raw":
        return RawPrompt(image)
    return ChatMlPrompt(begin_turn, end_turn, image)


class RawPrompt:
    """Prompts of the base model: one user message as it is. It knows no turns."""

    def __init__(self, image: list[int]) -> None:
        self._image = image

    def __call__(self, messages: list[dict[str, Any]], options: ChatOptions) -> PromptParts:
        refuse_options(options)
        if [message["role"] for message in messages] != ["user"]:
            raise InvalidRequest(
                "this model has no chat format: send one user message, which it continues"
            )
        return list(content_parts(messages[0]["content"], self._image, 1))


class ChatMlPrompt:
    """Prompts of the chat model: marked turns, and a system message at first."""

    def __init__(self, begin_turn: int, end_turn: int, image: list[int]) -> None:
        self._begin_turn = begin_turn
        self._end_turn = end_turn
        self._image = image

    def __call__(self, messages: list[dict[str, Any]], options: ChatOptions) -> PromptParts:
        check_continued(messages, options)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        prompt: list[Piece | int] = []
        num_images = 0
        for message in messages:
            prompt += self._turn(message["role"])
            prompt += content_parts(message["content"], self._image, 1 + num_images)
            prompt += [self._end_turn, Piece("\n", NO_TOKENS)]
            num_images = prompt.count(self._image[0])
        if options.continue_final_message:
            return prompt[:-2]
        return [*prompt, *self._turn("assistant")] if options.add_generation_prompt else prompt

    def _turn(self, role: str) -> list[Piece | int]:
        """Return the beginning of a turn. Role and line end are tokenized by themselves."""
        return [self._begin_turn, Piece(role, NO_TOKENS), Piece("\n", NO_TOKENS)]


def content_parts(
    content: str | list[dict[str, str]], image: list[int], number: int
) -> Iterator[Piece | int]:
    """Yield the content of a message. `number` is that of the next image of the conversation.

    Raises InvalidRequest if a text has a marker of images in it.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = ""
    for part in parts:
        if part["type"] == "text":
            text += part["text"]
            continue
        yield text_piece(f"{text}Picture {number}: ")
        yield from image
        text = "\n"
        number += 1
    if text:
        yield text_piece(text)


def text_piece(text: str) -> Piece:
    """Return a text that may only name the tokens of markup.

    In the published code a path between image markers is opened. A text with markers is refused
    because whoever sends it expects that.
    """
    if found := [marker for marker in IMAGE_MARKERS if marker in text]:
        raise InvalidRequest(
            f"the text has {found[0]} in it, which marks images: send images as parts of the "
            "message, and leave the marker out"
        )
    return Piece(text, MARKUP)
