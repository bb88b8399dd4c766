"""WeMM-Chat-2k-CN: images to patches, and chat messages to prompts."""

import math
from typing import Any

import numpy as np

from common.chat import ChatOptions
from common.checkpoint import Checkpoint
from common.errors import InvalidRequest, TooLarge
from common.families import wemm as family_rules
from common.families.wemm import END, START, grid_of
from common.item_hash import item_hash
from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.preprocess.families.limits import ItemLimits, check_bounds
from services.preprocess.families.patches import patches
from services.preprocess.prepared import PreparedItem, ReadyItem
from services.preprocess.prompts import Piece, PromptParts, check_continued

PLAIN: frozenset[str] = frozenset()
"""What a text may name of the special tokens: nobody writes them in words."""
DEFAULT_BOS_ID = 1


def full_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Return the (height, width) of an image whose longer side becomes `longest`.

    No side becomes shorter than `shortest`, which distorts long images.
    """
    aspect = width / height
    if width >= height:
        width = longest
        height = int(width / aspect)
    else:
        height = longest
        width = int(height * aspect)
    return max(height, shortest), max(width, shortest)


def smaller_size(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """Return the largest (height, width) of this shape whose longer side is whole patches, and
    which has at most `max_patches`."""
    longer = max(height, width)
    for side in range(longer // patch, 0, -1):
        new = side * patch
        size = max(height * new // longer, 1), max(width * new // longer, 1)
        if math.prod(grid_of(*size, patch)) <= max_patches:
            return size
    return patch, patch


def padded(rgb: np.ndarray, patch: int) -> np.ndarray:
    """Fill uint8 [height, width, 3] up to whole patches, at the right and at the lower edge.

    The tower does not read the values there.
    """
    height, width, _ = rgb.shape
    return np.pad(rgb, ((0, -height % patch), (0, -width % patch), (0, 0)))


class WemmRules:
    """The rules of WeMM for one checkpoint. They do not change."""

    whole = False
    fit_prompt = None

    def __init__(self, checkpoint: Checkpoint, limits: ItemLimits) -> None:
        """Read the checkpoint's settings. Raises ValueError if the limits cannot be kept."""
        self.fingerprint = checkpoint.fingerprint
        self.patch_size = family_rules.patch_size(checkpoint)
        self.stride = family_rules.downsampler_stride(checkpoint)
        self.shortest, self.longest = family_rules.edges(checkpoint)
        self.max_patches = self._max_patches(limits)
        self.resizes_oversized = limits.resizes_oversized
        self._bos_id: int = checkpoint.text_config.get("bos_token_id", DEFAULT_BOS_ID)
        self._start_id = family_rules.special_id(checkpoint, START)
        self._end_id = family_rules.special_id(checkpoint, END)
        self._placeholder_id = checkpoint.family.placeholder_id(checkpoint)

    def _max_patches(self, limits: ItemLimits) -> int:
        """Return the most patches that the deployment allows; 0 if it sets no limit."""
        if limits.min_pixels is not None:
            raise ValueError(
                f"min_pixels is {limits.min_pixels}, but this model enlarges every image to sides "
                f"of at least {self.shortest} pixels: leave min_pixels out"
            )
        if limits.max_pixels is None:
            return 0
        if limits.max_pixels < self.patch_size**2:
            raise ValueError(
                f"max_pixels is {limits.max_pixels}: give at least {self.patch_size**2}"
            )
        return limits.max_pixels // self.patch_size**2

    def fitting_size(
        self, height: int, width: int, max_patches: int, bounds: PixelBounds = NO_BOUNDS
    ) -> tuple[int, int]:
        size = full_size(height, width, self.shortest, self.longest)
        check_bounds(PixelBounds(bounds.min_pixels), *size)
        most = self.max_patches
        if bounds.max_pixels:
            asked = max(bounds.max_pixels // self.patch_size**2, 1)
            most = min(most or asked, asked)
        if most and self._num_patches(size) > most:
            size = smaller_size(*size, self.patch_size, most)
        if not max_patches or self._num_patches(size) <= max_patches:
            return size
        if not self.resizes_oversized:
            raise TooLarge(
                f"it has {self._num_patches(size)} patches, the vision replicas take at most "
                f"{max_patches}: give --max-pixels {max_patches * self.patch_size**2}"
            )
        return smaller_size(*size, self.patch_size, max_patches)

    def _num_patches(self, size: tuple[int, int]) -> int:
        return math.prod(grid_of(*size, self.patch_size))

    def num_tokens(self, height: int, width: int) -> int:
        return family_rules.num_tokens(*grid_of(height, width, self.patch_size), self.stride)

    def prepare_item(self, kind: ItemKind, pixels: np.ndarray) -> ReadyItem:
        height, width, _ = pixels.shape
        rows = patches(padded(pixels, self.patch_size), self.patch_size, 1)
        grid = (1, *grid_of(height, width, self.patch_size))
        size = (height, width)
        mm_hash = item_hash(self.fingerprint, kind, grid, size, rows.data)
        num_tokens = self.num_tokens(height, width)
        return ReadyItem(kind, mm_hash, grid, size, len(rows), num_tokens, rows)

    def positions(
        self, num_tokens: int, offsets: list[int], items: list[PreparedItem]
    ) -> tuple[np.ndarray, int]:
        """Text and images count up alike."""
        return np.arange(num_tokens, dtype=np.int64)[None], 0

    def rope_parameter(self, num_tokens: int) -> int:
        return 0

    def chat_prompt(self, messages: list[dict[str, Any]], options: ChatOptions) -> PromptParts:
        """Return the prompt of a conversation with at most one image.

        A single question ends without a newline, each message of a longer conversation with one.
        """
        check_continued(messages, options)
        kinds = [
            part["type"]
            for message in messages
            for part in message["content"]
            if isinstance(part, dict)
        ]
        if objection := family_rules.objection_to_images(len(kinds) - kinds.count("text")):
            raise InvalidRequest(objection)
        is_single = [message["role"] for message in messages] == ["user"]
        parts: list[Piece | int] = [self._bos_id]
        for message in messages:
            parts += [self._start_id, *self._said(message), self._end_id]
            if not is_single:
                parts.append(Piece("\n", PLAIN))
        if options.continue_final_message:
            return parts[:-2]
        if not options.add_generation_prompt:
            return parts
        return [*parts, self._start_id, Piece("assistant\n", PLAIN)]

    def _said(self, message: dict[str, Any]) -> list[Piece | int]:
        """Return a message's role and content.

        The image stands before the text, wherever the message has it: the model knows no other
        order. Each part of the text is a line.
        """
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            return [Piece(f"{role}\n{content}", PLAIN)]
        text = "\n".join(part["text"] for part in content if part["type"] == "text")
        if all(part["type"] == "text" for part in content):
            return [Piece(f"{role}\n{text}", PLAIN)]
        assert self._placeholder_id is not None
        return [
            Piece(f"{role}\n", PLAIN),
            self._placeholder_id,
            Piece(f"\n{text}", PLAIN, continues=True),
        ]
