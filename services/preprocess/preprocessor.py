"""Items and prompts of one checkpoint, prepared for the stages behind preprocess.

What differs between model families is in `services/preprocess/families`.
"""

from typing import Any, assert_never

import numpy as np

from common.checkpoint import Checkpoint
from common.errors import InvalidRequest
from common.messages import ItemKind
from common.vocabulary import open_vocabulary
from services.preprocess import chat_template, images
from services.preprocess.families import FamilyRules
from services.preprocess.prepared import ExpandedPrompt, PreparedItem

MAX_CHARS_PER_TOKEN = 16
"""No text has this many characters per token on average. Longer texts are refused before they are
tokenized: tokenizing megabytes only to refuse them would block the process for seconds."""


def decode(kind: ItemKind, data: bytes | bytearray | memoryview) -> np.ndarray:
    """Return the pixels of an encoded item: uint8 [height, width, 3]."""
    match kind:
        case "image":
            return images.decode(data)
        case _:
            assert_never(kind)


class Preprocessor:
    """Prepares items and prompts. It does not change after it was made."""

    def __init__(
        self, checkpoint: Checkpoint, rules: FamilyRules, max_model_len: int | None = None
    ) -> None:
        """`max_model_len` is the context in tokens, and the model's own by default.

        Raises
        ------
        BadCheckpoint
            if the vocabulary or the chat template is damaged.
        ValueError
            if `max_model_len` exceeds the model's context.
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
        self.template = chat_template.load(checkpoint.path)
        self.vocabulary = open_vocabulary(checkpoint)
        self.placeholder_id = checkpoint.family.placeholder_id(checkpoint)
        self.placeholder = self._name_of(self.placeholder_id)

    def _name_of(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.vocabulary.token_of(token_id)

    def prepare_item(
        self,
        kind: ItemKind,
        data: bytes | bytearray | memoryview,
        buckets: tuple[int, ...] = (),
    ) -> PreparedItem:
        """Decode and resize one encoded item, cut it into patches, and name it.

        If there are buckets (patch counts), the item must fit into one of them.

        Raises
        ------
        InvalidRequest
            or its children UnreadableImage and TooLarge. The caller knows which item it was.
        """
        pixels = decode(kind, data)
        size = self.rules.fitting_size(pixels, max(buckets, default=0))
        return self.rules.prepare_item(kind, images.resize(pixels, *size))

    def tokenize(self, prompt_kind: str, prompt: Any) -> np.ndarray:
        """Return the token ids of chat messages or of given ids: int64 [num_tokens].

        They hold one placeholder for each item.

        Raises
        ------
        InvalidRequest
            if the messages are malformed, or an id is outside the model's vocabulary.
        """
        if prompt_kind == "messages":
            return self.encode(self.template.render(prompt))
        assert prompt_kind == "token_ids", prompt_kind
        token_ids = np.asarray(prompt, dtype=np.int64)
        if token_ids.size == 0:
            raise InvalidRequest("the prompt is empty")
        bad = token_ids[(token_ids < 0) | (token_ids >= self.vocab_size)]
        if bad.size:
            raise InvalidRequest(
                f"token id {bad[0]} is outside the model's vocabulary of {self.vocab_size}"
            )
        return token_ids

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a prompt's text: int64 [num_tokens].

        Raises
        ------
        InvalidRequest
            if the text is far longer than the model's context, or not valid Unicode.
        """
        if len(text) > MAX_CHARS_PER_TOKEN * self.max_model_len:
            raise InvalidRequest(
                f"the prompt's text has {len(text)} characters, far more than the model's context "
                f"of {self.max_model_len} tokens: shorten it"
            )
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InvalidRequest(
                "the text holds half of a surrogate pair; send valid Unicode"
            ) from e
        return np.array(self.vocabulary.encode(text), dtype=np.int64)

    def expand(self, token_ids: np.ndarray, items: list[PreparedItem]) -> ExpandedPrompt:
        """Repeat each item's placeholder as often as the item has tokens, and add the positions.

        Raises
        ------
        InvalidRequest
            if the number of placeholders is not the number of items.
        """
        found = np.flatnonzero(token_ids == self.placeholder_id)
        if len(found) != len(items):
            raise InvalidRequest(
                f"the prompt has {len(found)} image placeholders for {len(items)} images:"
                f" give one for each image, and leave {self.placeholder} out of the text"
            )
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
