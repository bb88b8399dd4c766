"""The bounds of pixels that a request sets to its images and videos.

They may stand in several places. All of them hold, so the narrowest ones count.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.pixel_bounds import NO_BOUNDS, PixelBounds
from services.gateway.invalid_field import InvalidField

DETAILS = {
    "low": PixelBounds(max_pixels=512 * 512),
    "high": NO_BOUNDS,
    "auto": NO_BOUNDS,
    "original": NO_BOUNDS,
}
"""What OpenAI's levels of detail mean here."""
BOUNDS = ("min_pixels", "max_pixels")
EDGES = ("shortest_edge", "longest_edge")
"""The names of the bounds in the `size` of the family's processors. There, too, they are pixels."""
ABOUT_CACHES = ("cache_control", "uuid", "prompt_cache_breakpoint")
"""Keys that ask for nothing: what is cached here is found by its content."""
KWARGS = "mm_processor_kwargs"
IN_KWARGS = (*BOUNDS, "size")


def bounds_of_detail(given: Mapping[str, Any], path: str) -> PixelBounds:
    """Return the bounds that the level of detail of an image sets."""
    detail = given.get("detail")
    if detail is None:
        return NO_BOUNDS
    if not isinstance(detail, str) or detail not in DETAILS:
        raise InvalidField(f"{path}.detail", f"must be one of {', '.join(DETAILS)}")
    return DETAILS[detail]


def read_processor_kwargs(kwargs: dict[str, Any]) -> tuple[PixelBounds, PixelBounds]:
    """Return the bounds in the field mm_processor_kwargs: of all items, and of images alone.

    Raises
    ------
    InvalidField
        if it asks for anything else.
    """
    refuse_unknown(kwargs, (*IN_KWARGS, "images_kwargs"), KWARGS)
    nested = kwargs.get("images_kwargs") or {}
    path = f"{KWARGS}.images_kwargs"
    if not isinstance(nested, dict):
        raise InvalidField(path, "must be an object")
    refuse_unknown(nested, IN_KWARGS, path)
    return bounds_of_kwargs(kwargs, KWARGS), bounds_of_kwargs(nested, path)


def bounds_of_kwargs(given: Mapping[str, Any], path: str) -> PixelBounds:
    size = bounds_of_size(given.get("size"), f"{path}.size")
    return narrowest([bounds_in(given, BOUNDS, path), size], path)


def bounds_of_size(size: Any, path: str) -> PixelBounds:
    """Return the bounds in the `size` of a processor."""
    if size is None:
        return NO_BOUNDS
    if not isinstance(size, dict):
        raise InvalidField(path, f"must be an object with {' and '.join(EDGES)}")
    refuse_unknown(size, EDGES, path)
    return bounds_in(size, EDGES, path)


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    """Raise InvalidField if there is a key that is not known, whose value is not null."""
    for name in given.keys() - set(known):
        if given[name] is not None:
            problem = f"this field is not supported; known are {', '.join(known)}"
            raise InvalidField(f"{path}.{name[:40]}", problem)


def bounds_in(given: Mapping[str, Any], names: Sequence[str], path: str) -> PixelBounds:
    """Return the bounds that an object has under these names."""
    for name in names:
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidField(f"{path}.{name}", "must be a whole number of pixels")
    bounds = PixelBounds(*map(given.get, names))
    if bounds.objection:
        raise InvalidField(path, bounds.objection)
    return bounds


def narrowest(several: Sequence[PixelBounds], path: str) -> PixelBounds:
    """Return the bounds that keep to all of these. Raises InvalidField if there are none."""
    least = [bounds.min_pixels for bounds in several if bounds.min_pixels is not None]
    most = [bounds.max_pixels for bounds in several if bounds.max_pixels is not None]
    found = PixelBounds(max(least, default=None), min(most, default=None))
    if found.objection:
        raise InvalidField(path, found.objection)
    return found
