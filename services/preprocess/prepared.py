"""What preprocess makes of a request: prepared items and the expanded prompt."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np

from common.messages import ItemKind

SALT_BYTES = 16


class PreparedItem(Protocol):
    """One item, decoded, resized and cut into patches."""

    @property
    def kind(self) -> ItemKind: ...

    @property
    def mm_hash(self) -> str:
        """64 hex digits: the name of the content, equal for equal pixels in any file format.

        `common/item_hash.py` computes it.
        """
        ...

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """The grid of patches: steps in time, rows, columns."""
        ...

    @property
    def content_size(self) -> tuple[int, int]:
        """Height and width of the content in pixels, without padding."""
        ...

    @property
    def step_seconds(self) -> float:
        """The time that passes from one step to the next; 0 if there is only one."""
        ...

    @property
    def num_patches(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """The number of prompt tokens that the item becomes."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the item takes while it waits."""
        ...

    def patches(self) -> np.ndarray:
        """uint8 [num_patches, values per patch], in the order that the family's tower expects."""
        ...


@dataclass(frozen=True, eq=False)
class ReadyItem:
    """An item that a sandbox has prepared. Implements `PreparedItem`."""

    kind: ItemKind
    mm_hash: str
    grid_thw: tuple[int, int, int]
    content_size: tuple[int, int]
    num_patches: int
    num_tokens: int
    rows: np.ndarray
    """The patches."""
    step_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def patches(self) -> np.ndarray:
        return self.rows


@dataclass(frozen=True)
class ExpandedPrompt:
    """A prompt as the language model takes it."""

    token_ids: np.ndarray
    """int64 [num_tokens], with as many placeholders for each item as it has tokens."""
    positions: np.ndarray
    """int64 [num_components, num_tokens]."""
    rope_delta: int
    """The position of a token after the prompt is its index + rope_delta."""
    placeholders: np.ndarray
    """int64 [num_items, 2]: offset and length of each item's placeholders."""
    rope_parameter: int = 0
    """A parameter of the rotary embedding that belongs to the request; 0 if there is none."""
    whole: bool = False
    """Whether the prompt must be computed in one step, without chunks and prefix cache."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def cache_salt(self) -> bytes:
        """The root of the prefix cache's names.

        It covers whatever changes the keys and values of equal tokens: here the rope parameter.
        """
        if not self.rope_parameter:
            return b""
        text = f"rope parameter {self.rope_parameter}"
        return blake2b(text.encode(), digest_size=SALT_BYTES).digest()
