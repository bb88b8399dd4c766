"""The image formats that a deployment may let clients send. No other list of formats exists."""

IMAGE_FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000")
"""The formats in which an image is read, by the names that settings and errors use. Everything else
is refused: each reader is one more parser of hostile bytes."""


def listed_formats(text: str) -> list[str]:
    """Return the names in a text that separates them by commas. An empty text has none."""
    return [name.strip().lower() for name in text.split(",")] if text else []


def objection_to_image_formats(text: str) -> str:
    """Return why a text does not list image formats."""
    if set(listed_formats(text)) <= set(IMAGE_FORMATS):
        return ""
    return f"give some of {','.join(IMAGE_FORMATS)}"
