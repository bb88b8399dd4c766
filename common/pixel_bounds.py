"""How many pixels a client lets a resized image, or a frame of a video, have."""

import msgspec

MAX_BOUND = 2**32 - 1


class PixelBounds(msgspec.Struct, frozen=True):
    """The fewest and the most pixels. None leaves it to the deployment."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __bool__(self) -> bool:
        return self != NO_BOUNDS

    @property
    def objection(self) -> str:
        """Why no image can keep to the bounds; empty if one can."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_BOUND:
                return f"{name} must be a whole number from 1 to {MAX_BOUND}"
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            return f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}"
        return ""

    def within(self, least: int, most: int) -> tuple[int, int]:
        """Return the bounds in effect if the deployment allows `least` to `most` pixels."""
        low = least if self.min_pixels is None else min(max(self.min_pixels, least), most)
        high = most if self.max_pixels is None else min(max(self.max_pixels, least), most)
        return min(low, high), high

    def objection_to(self, height: int, width: int) -> str:
        """Return why a model cannot obey the bounds if it always makes an image of this size."""
        pixels = height * width
        for name, is_kept in (
            ("min_pixels", (self.min_pixels or 0) <= pixels),
            ("max_pixels", (self.max_pixels or pixels) >= pixels),
        ):
            if not is_kept:
                return (
                    f"this model resizes the image to {width}x{height} pixels, whatever is asked, "
                    f"and {name} {getattr(self, name)} excludes that: leave it out"
                )
        return ""


NO_BOUNDS = PixelBounds()
