"""What preprocess needs of a model family that takes videos."""

from typing import Protocol

import numpy as np

from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.preprocess.prepared import PreparedItem


class VideoRules(Protocol):
    """The rules by which one family prepares videos. All frames are resized to one size."""

    @property
    def frames_per_step(self) -> int:
        """The frames that become one step in time."""
        ...

    def fitting_size(
        self,
        height: int,
        width: int,
        num_frames: int,
        max_patches: int,
        bounds: PixelBounds = NO_BOUNDS,
    ) -> tuple[int, int]:
        """Return the (height, width) to which the frames of a video of this size are resized.

        The video must have at most `max_patches` patches, if that is not 0. Its frames keep to the
        client's `bounds` as far as the deployment's limits allow.

        Raises
        ------
        InvalidRequest
            if the family does not take such a video. It is TooLarge if a smaller one would fit.
        """
        ...

    def num_tokens(self, height: int, width: int, num_frames: int) -> int:
        """Return the number of prompt tokens of a video whose frames were resized to this size."""
        ...

    def prepare(self, frames: np.ndarray, step_seconds: float) -> PreparedItem:
        """Cut resized frames, uint8 [num_frames, height, width, 3], into patches, and name the
        result. A step in time takes `step_seconds`."""
        ...
