"""The limits that a deployment sets to the size of items."""

from dataclasses import dataclass

from common.errors import InvalidRequest
from common.pixel_bounds import PixelBounds


@dataclass(frozen=True, slots=True)
class ItemLimits:
    """The limits of resized items. The checkpoint decides what is None."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resizes_oversized: bool = True
    """Whether an item that is too large for every vision replica is made smaller, not refused."""

    def check_square(self, side: int) -> None:
        """Raise ValueError if they exclude the one size of a model's images, side x side pixels."""
        pixels = side**2
        if (self.min_pixels or 0) > pixels or (self.max_pixels or pixels) < pixels:
            raise ValueError(
                f"this model takes images of {side} x {side} pixels only, and resizes all to that: "
                "leave out --min-pixels and --max-pixels"
            )


def check_bounds(bounds: PixelBounds, height: int, width: int) -> None:
    """Raise InvalidRequest if the client's bounds exclude the one size that an image gets."""
    if objection := bounds.objection_to(height, width):
        raise InvalidRequest(objection)
