"""Images in the parts of messages, with the bounds of pixels that they set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.pixel_bounds import PixelBounds
from services.gateway.images import read_data_uri
from services.gateway.pixel_bounds import (
    ABOUT_CACHES,
    BOUNDS,
    KWARGS,
    bounds_in,
    bounds_of_detail,
    narrowest,
    read_processor_kwargs,
    refuse_unknown,
)
from services.gateway.videos import BoundedImage, Media, Video, bounds_of, bytes_of

IN_IMAGE_URL = ("url", "detail", *BOUNDS, *ABOUT_CACHES)
IN_PART = ("type", "image_url", "detail", *BOUNDS, *ABOUT_CACHES)


def read_image(part: dict[str, Any], path: str, index: int) -> Media:
    """Return the image of a part of the type image_url, with the bounds that the part sets.

    `path` names the part in errors, and `index` is that of the image in the request.

    Raises
    ------
    InvalidRequest
        if the image cannot be read, a key is not known, or the bounds are wrong.
    """
    inside = f"{path}.image_url"
    image = part["image_url"]
    if isinstance(image, str):
        image = {"url": image}
    refuse_unknown(part, IN_PART, path)
    refuse_unknown(image, IN_IMAGE_URL, inside)
    found = [
        bounds
        for given, place in ((part, path), (image, inside))
        for bounds in (bounds_in(given, BOUNDS, place), bounds_of_detail(given, place))
    ]
    bounds = narrowest(found, path)
    data = read_data_uri(image["url"], inside, index)
    return BoundedImage(data, bounds) if bounds else data


def bounded(media: Sequence[Media], kwargs: dict[str, Any] | None) -> tuple[Media, ...]:
    """Return images and videos that keep to the bounds of a request as well as to their own.

    `kwargs` is the field mm_processor_kwargs. Raises InvalidField if it asks for anything else.
    """
    if not kwargs:
        return tuple(media)
    of_all, of_images = read_processor_kwargs(kwargs)
    return tuple(
        with_bounds(one, [of_all] if isinstance(one, Video) else [of_all, of_images])
        for one in media
    )


def with_bounds(media: Media, more: list[PixelBounds]) -> Media:
    """Return an image or a video that keeps to more bounds."""
    bounds = narrowest([bounds_of(media), *more], KWARGS)
    if bounds == bounds_of(media):
        return media
    if isinstance(media, Video):
        return replace(media, bounds=bounds)
    return BoundedImage(bytes_of(media), bounds)
