"""What `twinlens verify` asks: a few prompts that use a model's text and image side."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from services.commands.chat_client import image_part, media_type
from services.commands.client import ClientError, read_file

TEXT = "Name three things that one can buy at a market, and say what each is good for."
ABOUT_ONE = "What does the picture show?"
ABOUT_ALL = "What do the pictures have in common?"
LONG = " ".join(
    f"Station {n} lies {3 * n + 2} kilometres from the coast, and {n % 7 + 1} trains stop there "
    "every hour."
    for n in range(1, 31)
)
LONG_TEXT = f"{LONG} Which station lies the furthest from the coast?"
MANY_WORDS = "What is the colour of the line that crosses the picture " + "from side to side " * 8
"""More words than VLMo reads, and few enough characters that it accepts them."""
SAMPLE_SIZES = ((420, 300), (196, 266))
"""(width, height) of the built-in images. No tower's windows or squares divide both evenly."""


@dataclass(frozen=True)
class Question:
    """One message of a user: images, then a text. Either may be missing."""

    name: str
    text: str
    images: tuple[bytes, ...] = ()
    """The images as files."""

    def messages(self) -> list[dict[str, Any]]:
        """Return the question as OpenAI's messages."""
        parts = [image_part(image) for image in self.images]
        if self.text:
            parts.append({"type": "text", "text": self.text})
        return [{"role": "user", "content": parts if self.images else self.text}]


def chat_questions(images: Sequence[bytes], max_images: int) -> list[Question]:
    """Return the questions to a model that writes and takes up to `max_images` in a question.

    `images` are the user's; without any, built-in ones are drawn.
    """
    shown = list(images) or sample_images()
    questions = [Question("text", TEXT), Question("long text", LONG_TEXT)]
    questions += [
        Question(f"image {n}" if len(shown) > 1 else "image", ABOUT_ONE, (image,))
        for n, image in enumerate(shown, 1)
    ]
    together = tuple(shown if len(shown) > 1 else shown * 2)[:max_images]
    if len(together) > 1:
        questions.append(Question("images together", ABOUT_ALL, together))
    return questions


def label_questions(images: Sequence[bytes]) -> list[Question]:
    """Return the questions to a model that answers one text about one image with a label."""
    shown = list(images) or sample_images()
    questions = [Question(f"image {n}", ABOUT_ONE, (image,)) for n, image in enumerate(shown, 1)]
    return [*questions, Question("long text", MANY_WORDS, tuple(shown[:1]))]


def vector_questions(images: Sequence[bytes]) -> list[Question]:
    """Return the texts and images for a model that makes a vector of either."""
    shown = list(images) or sample_images()
    questions = [Question(f"image {n}", "", (image,)) for n, image in enumerate(shown, 1)]
    return [Question("text", TEXT), Question("long text", MANY_WORDS), *questions]


def sample_images() -> list[bytes]:
    """Return drawn images as PNG files: shades, shapes and a frame, the same at each call."""
    return [draw_sample(*size) for size in SAMPLE_SIZES]


def draw_sample(width: int, height: int) -> bytes:
    shades = [Image.linear_gradient("L"), Image.radial_gradient("L")]
    third = Image.linear_gradient("L").rotate(90)
    image = Image.merge("RGB", [shade.resize((width, height)) for shade in (*shades, third)])
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 10, height // 8, width // 3, height // 2), fill=(200, 30, 40))
    draw.ellipse((width // 2, height // 3, width - 20, height - 15), outline=(10, 40, 160), width=9)
    draw.line((8, height - 12, width - 8, height // 4), fill=(255, 240, 20), width=5)
    draw.rectangle((3, 3, width - 4, height - 4), outline=(0, 0, 0), width=2)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read_rgb(image: bytes) -> Image.Image:
    """Return an image file's pixels, upright."""
    with Image.open(BytesIO(image)) as opened:
        upright: Image.Image = ImageOps.exif_transpose(opened)
        return upright.convert("RGB")


def read_image(path: Path) -> bytes:
    """Return the contents of an image file. Raises ClientError if it cannot be asked about."""
    data = read_file(path)
    if not media_type(data):
        raise ClientError(f"{path} is not a PNG, JPEG, GIF or WebP file")
    try:
        read_rgb(data)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as e:
        raise ClientError(f"{path} cannot be read as an image: {e}") from e
    return data
