"""VLMo: images of one size, and texts that are padded or cut to one length."""

from typing import Any

import numpy as np

from common.chat import ChatOptions
from common.checkpoint import Checkpoint
from common.errors import InvalidRequest
from common.families import vlmo as family_rules
from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.preprocess.families.limits import ItemLimits, check_bounds
from services.preprocess.families.patches import square_item
from services.preprocess.prepared import PreparedItem, ReadyItem
from services.preprocess.prompts import Piece, PromptParts, refuse_options

NO_TOKENS = frozenset[str]()


class VlmoRules:
    """The rules of VLMo for one checkpoint. They do not change."""

    whole = True

    def __init__(self, checkpoint: Checkpoint, limits: ItemLimits) -> None:
        """Read the checkpoint's settings. Raises ValueError if the limits cannot be kept."""
        self.fingerprint = checkpoint.fingerprint
        self.patch_size = family_rules.patch_size(checkpoint)
        self.num_patches = family_rules.grid_side(checkpoint) ** 2
        self.side = family_rules.grid_side(checkpoint) * self.patch_size
        self.text_len = family_rules.max_text_len(checkpoint)
        self.asks = "classify" in checkpoint.family.tasks_of(checkpoint)
        self.pad, self.begin, self.end, self.placeholder = (
            family_rules.special_id(checkpoint, token)
            for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
        )
        limits.check_square(self.side)

    def chat_prompt(self, messages: list[dict[str, Any]], options: ChatOptions) -> PromptParts:
        """Return the text and the image of the only message, whatever their order in it."""
        refuse_options(options)
        texts, num_images = contents_of(messages)
        wanted = (1, 1) if self.asks else (1, 0) if texts else (0, 1)
        if (len(texts), num_images) != wanted:
            what = "one image and one text" if self.asks else "either one image or one text"
            raise InvalidRequest(f"this model takes one user message with {what}")
        parts: list[Piece | int] = []
        for text in texts:
            parts += [self.begin, Piece(text, NO_TOKENS), self.end]
        return [*parts, self.begin, self.placeholder] if num_images else parts

    def fit_prompt(self, token_ids: np.ndarray) -> np.ndarray:
        """Cut or pad the text to the model's length. Its end token stays."""
        has_image = token_ids[-1] == self.placeholder
        text, image = np.split(token_ids, [len(token_ids) - 2 * has_image])
        if not len(text):
            return token_ids
        if len(text) > self.text_len:
            text = np.append(text[: self.text_len - 1], self.end)
        padding = np.full(self.text_len - len(text), self.pad)
        return np.concatenate([text, padding, image])

    def fitting_size(
        self, height: int, width: int, max_patches: int, bounds: PixelBounds = NO_BOUNDS
    ) -> tuple[int, int]:
        check_bounds(bounds, self.side, self.side)
        return self.side, self.side

    def num_tokens(self, height: int, width: int) -> int:
        return self.num_patches

    def prepare_item(self, kind: ItemKind, pixels: np.ndarray) -> ReadyItem:
        return square_item(self.fingerprint, kind, pixels, self.patch_size, self.num_patches)

    def positions(
        self, num_tokens: int, offsets: list[int], items: list[PreparedItem]
    ) -> tuple[np.ndarray, int]:
        return np.arange(num_tokens, dtype=np.int64)[None], 0

    def rope_parameter(self, num_tokens: int) -> int:
        return 0


def contents_of(messages: list[dict[str, Any]]) -> tuple[list[str], int]:
    """Return the texts of the only message that are not empty, and the number of its images.

    Raises InvalidRequest if there are other messages.
    """
    if [message["role"] for message in messages] != ["user"]:
        raise InvalidRequest("this model knows no conversations: send one user message")
    content = messages[0]["content"]
    if isinstance(content, str):
        return [content], 0
    texts = [part["text"] for part in content if part["type"] == "text"]
    return [text for text in texts if text], len(content) - len(texts)
