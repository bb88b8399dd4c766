"""What preprocess needs of a model family."""

from typing import Protocol

import numpy as np

from common.messages import ItemKind
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.preprocess.prepared import PreparedItem
from services.preprocess.prompts import ChatPrompt, FitPrompt


class FamilyRules(Protocol):
    """The rules by which one family prepares items and places tokens."""

    @property
    def whole(self) -> bool:
        """Whether a prompt must be computed in one step, without chunks and prefix cache."""
        ...

    @property
    def chat_prompt(self) -> ChatPrompt | None:
        """Makes prompts of chat messages; None if the checkpoint brings a template for that."""
        ...

    @property
    def fit_prompt(self) -> FitPrompt | None:
        """Cuts or pads the tokens of a chat's prompt; None if prompts may have any length."""
        ...

    def fitting_size(
        self, height: int, width: int, max_patches: int, bounds: PixelBounds = NO_BOUNDS
    ) -> tuple[int, int]:
        """Return the (height, width) to which an item of this size in pixels is resized.

        It must have at most `max_patches` patches, if that is not 0. It keeps to the client's
        `bounds` as far as the deployment's limits allow.

        Raises
        ------
        InvalidRequest
            if the family does not take such an item. It is TooLarge if a smaller one would fit.
        """
        ...

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of prompt tokens of an item that was resized to this size."""
        ...

    def prepare_item(self, kind: ItemKind, pixels: np.ndarray) -> PreparedItem:
        """Cut resized pixels, uint8 [height, width, 3], into patches, and name the result."""
        ...

    def positions(
        self, num_tokens: int, offsets: list[int], items: list[PreparedItem]
    ) -> tuple[np.ndarray, int]:
        """Return the positions of a prompt, int64 [num_components, num_tokens], and its rope delta.

        `items[i]` has its tokens from index `offsets[i]` on.
        """
        ...

    def rope_parameter(self, num_tokens: int) -> int:
        """Return the rotary embedding's parameter for a prompt; 0 if the family has none."""
        ...
