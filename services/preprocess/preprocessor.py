"""Items and prompts of one checkpoint, prepared for the stages behind preprocess.

What differs between model families is in `services/preprocess/families`.
"""

from functools import cached_property
from typing import Any, assert_never

import numpy as np
from PIL.Image import Image

from common.checkpoint import Checkpoint
from common.errors import InvalidRequest
from common.messages import ItemKind
from common.vocabulary import Vocabulary, open_vocabulary
from common.wire import Buffer
from services.preprocess import chat_template, images
from services.preprocess.chat_template import ChatTemplate
from services.preprocess.families import FamilyRules
from services.preprocess.prepared import ExpandedPrompt, PreparedItem
from services.preprocess.prompts import Piece, PromptParts, num_chars
from services.preprocess.sampling_defaults import add_instruction

MAX_CHARS_PER_TOKEN = 16
"""No text has this many characters per token on average. Longer texts are refused before they are
tokenized: tokenizing megabytes only to refuse them would block the process for seconds."""


def open_item(kind: ItemKind, data: Buffer) -> Image:
    """Read the header of an encoded item.

    Raises UnreadableImage or TooLarge. The caller knows which item it was.
    """
    match kind:
        case "image":
            return images.open_image(data)
        case _:
            assert_never(kind)


class Preprocessor:
    """Prepares items and prompts. It does not change after it was made."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rules: FamilyRules,
        max_model_len: int | None = None,
        known_as: str = "",
    ) -> None:
        """`max_model_len` is the context in tokens, and the model's own by default.

        `known_as` is the published name of the model, if its directory does not say it.

        Raises ValueError if `max_model_len` exceeds the model's context.
        """
        self.checkpoint = checkpoint
        self.rules = rules
        self.max_model_len = checkpoint.max_model_len if max_model_len is None else max_model_len
        if not 0 < self.max_model_len <= checkpoint.max_model_len:
            raise ValueError(
                f"max_model_len is {max_model_len}, the model's context is "
                f"{checkpoint.max_model_len}: give at most that"
            )
        self.vocab_size = checkpoint.sizes.vocab_size
        self.placeholder_id = checkpoint.family.placeholder_id(checkpoint)
        self.tasks = checkpoint.family.tasks_of(checkpoint)
        names = (known_as,) if known_as else checkpoint.names
        self.defaults = checkpoint.family.request_defaults(checkpoint, names)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the model. Raises BadCheckpoint if its file is damaged."""
        return open_vocabulary(self.checkpoint)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the model. Raises BadCheckpoint if there is none, or it is wrong."""
        return chat_template.load(self.checkpoint.path)

    @property
    def placeholder(self) -> str | None:
        """The name of the token that stands for an item in a prompt, if there is one."""
        if self.placeholder_id is None:
            return None
        return self.vocabulary.token_of(self.placeholder_id)

    def num_tokens(self, size: tuple[int, int], max_patches: int = 0) -> int:
        """Return the tokens that an item of this (height, width) becomes.

        Raises InvalidRequest if there can be no such item.
        """
        return self.rules.num_tokens(*self.rules.fitting_size(*size, max_patches))

    def prepare_item(
        self, kind: ItemKind, data: Buffer | Image, max_patches: int = 0
    ) -> PreparedItem:
        """Decode, resize, cut into patches and name one item, encoded or already opened.

        It must have at most `max_patches` patches, if that is not 0.

        Raises
        ------
        InvalidRequest
            or its children UnreadableImage and TooLarge. The caller knows which item it was.
        """
        image = images.decode(data if isinstance(data, Image) else open_item(kind, data))
        size = self.rules.fitting_size(image.height, image.width, max_patches)
        resampling = self.checkpoint.family.resampling
        return self.rules.prepare_item(kind, images.resize(image, *size, resampling))

    def render(self, messages: Any) -> PromptParts:
        """Return the prompt of chat messages.

        Raises InvalidRequest if they are malformed, or the model has no words for them.
        """
        known = add_instruction(chat_template.normalise(messages), self.defaults.instruction)
        if self.rules.chat_prompt is not None:
            return self.rules.chat_prompt(known)
        return [Piece(self.template.render(known))]

    def check_token_ids(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the token ids of a prompt, int64 [num_tokens], if they are the model's.

        Raises InvalidRequest if there are none, or one is outside the model's vocabulary. The
        placeholder of items may be outside it.
        """
        if token_ids.size == 0:
            raise InvalidRequest("the prompt is empty")
        is_outside = (token_ids < 0) | (token_ids >= self.vocab_size)
        bad = token_ids[is_outside & (token_ids != self.placeholder_id)]
        if bad.size:
            raise InvalidRequest(
                f"token id {bad[0]} is outside the model's vocabulary of {self.vocab_size}"
            )
        return token_ids

    def encode(self, parts: PromptParts) -> np.ndarray:
        """Return the token ids of a prompt: int64 [num_tokens].

        Raises
        ------
        InvalidRequest
            if the text is far longer than the model's context, or not valid Unicode.
        """
        if (length := num_chars(parts)) > MAX_CHARS_PER_TOKEN * self.max_model_len:
            raise InvalidRequest(
                f"the prompt's text has {length} characters, far more than the model's context "
                f"of {self.max_model_len} tokens: shorten it"
            )
        token_ids: list[int] = []
        for part in parts:
            token_ids += self._encode_piece(part) if isinstance(part, Piece) else [part]
        found = np.array(token_ids, dtype=np.int64)
        return found if self.rules.fit_prompt is None else self.rules.fit_prompt(found)

    def _encode_piece(self, piece: Piece) -> list[int]:
        try:
            piece.text.encode()
        except UnicodeEncodeError as e:
            raise InvalidRequest(
                "the text holds half of a surrogate pair; send valid Unicode"
            ) from e
        return self.vocabulary.encode(piece.text, piece.special_tokens, piece.continues)

    def find_placeholders(self, token_ids: np.ndarray, num_items: int) -> np.ndarray:
        """Return the index of each placeholder of a prompt: int64 [num_items].

        Raises
        ------
        InvalidRequest
            if the number of placeholders is not the number of items.
        """
        found = np.flatnonzero(token_ids == self.placeholder_id)
        if len(found) != num_items:
            advice = f", and leave {self.placeholder} out of the text" if self.placeholder else ""
            raise InvalidRequest(
                f"the prompt has {len(found)} image placeholders for {num_items} images:"
                f" give one for each image{advice}"
            )
        family = self.checkpoint.family
        if objection := family.objection_to_prompt(self.checkpoint, token_ids):
            raise InvalidRequest(f"the prompt's markers of images are wrong: {objection}")
        return found

    def expand(self, token_ids: np.ndarray, items: list[PreparedItem]) -> ExpandedPrompt:
        """Repeat each item's placeholder as often as the item has tokens, and add the positions.

        Raises
        ------
        InvalidRequest
            if the number of placeholders is not the number of items.
        """
        found = self.find_placeholders(token_ids, len(items))
        lengths = np.array([item.num_tokens for item in items], dtype=np.int64)
        repeats = np.ones(len(token_ids), dtype=np.int64)
        repeats[found] = lengths
        offsets = found + np.cumsum(lengths - 1) - (lengths - 1)
        expanded = np.repeat(token_ids, repeats)
        positions, rope_delta = self.rules.positions(len(expanded), offsets.tolist(), items)
        return ExpandedPrompt(
            expanded,
            positions,
            rope_delta,
            np.stack([offsets, lengths], axis=1),
            self.rules.rope_parameter(len(expanded)),
            self.rules.whole,
        )
