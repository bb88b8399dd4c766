"""One image of printed text, and what is known of it: its text, and where every character lies.

A place is cell * SLOTS + slot: one of the 2x4 slots of a cell of 28x28 pixels.
"""

import io
import random
from dataclasses import dataclass

import numpy as np
from fonts import advance, pick_font
from kinds import KINDS, LINE_LAYOUTS, Look
from layouts import Page, Plan, Segment
from PIL import Image, ImageDraw, ImageFilter
from settings import CELL, CHARACTER_CLASS, SLOT_COLUMNS, SLOT_ROWS, SLOTS, TOKEN


@dataclass
class Sample:
    image: np.ndarray  # uint8 [height, width], its luma
    text: str
    slots: np.ndarray  # the class of every slot [cells, SLOTS]
    answer: np.ndarray  # the bytes of the text, then <|im_end|>
    places: np.ndarray  # for every byte of the answer, where the next character lies


def colours(rng: random.Random, look: Look) -> tuple[int, int]:
    """-> paper, ink"""
    r = rng.random()
    if r < look.light_on_dark:
        paper = 0 if rng.random() < 0.35 else rng.randint(0, 110)
        return paper, 255 if rng.random() < 0.5 else rng.randint(paper + 90, 255)
    if r < look.light_on_dark + look.tinted:
        paper = rng.randint(110, 220)
        return paper, 0 if rng.random() < 0.5 else rng.randint(0, paper - 90)
    paper = 255 if rng.random() < 0.6 else rng.randint(200, 255)
    return paper, 0 if rng.random() < 0.5 else rng.randint(0, 100)


def font_px(rng: random.Random, kind_name: str, look: Look, height: int) -> int:
    kind = KINDS[kind_name]
    if rng.random() < look.small:
        return rng.randint(12, 15)
    one_line = kind.most == 1 and kind.layout in LINE_LAYOUTS
    tallest = (height - 2) / 1.22 if one_line else height / (1.2 * kind.fewest)
    low, high, mode = kind.px
    return max(min(14, low), min(round(rng.triangular(low, high, mode)), int(tallest)))


def zoom_of(rng: random.Random) -> float:
    """How much larger the image is drawn than it reaches the model."""
    r = rng.random()
    return 1.0 if r < 0.85 else rng.uniform(1.2, 2.0) if r < 0.95 else rng.uniform(0.8, 1.0)


def jitter(rng: random.Random) -> tuple[int, int]:
    return (rng.randint(-13, 13), rng.randint(-13, 13)) if rng.random() < 0.5 else (0, 0)


def lay_out(rng: random.Random, kind_name: str, look: Look, rows: int, columns: int) -> Page:
    kind = KINDS[kind_name]
    zoom = zoom_of(rng)
    (dx, dy) = jitter(rng)
    page = Page(round((columns * CELL + dx) * zoom), round((rows * CELL + dy) * zoom))
    px = max(8, round(font_px(rng, kind_name, look, rows * CELL) * zoom))
    if rng.random() >= look.blank:
        kind.layout(rng, page, Plan(pick_font(rng), px, kind.fewest, kind.most, kind.filled))
    return page


def draw(page: Page, paper: int, ink: int) -> Image.Image:
    image = Image.new("L", (page.width, page.height), paper)
    canvas = ImageDraw.Draw(image)
    for top, bottom in page.bands:
        canvas.rectangle((0, top, page.width, bottom), fill=ink)
    for left, y, right, thickness in page.rules:
        canvas.line((left, y, right, y), fill=ink, width=thickness)
    for segment in page.segments:
        canvas.text(
            (segment.x, segment.top),
            segment.text,
            font=segment.font,
            fill=paper if segment.inverse else ink,
        )
    return image


def wear(rng: random.Random, image: Image.Image) -> Image.Image:
    """A little blur, noise or recompression, on about a fifth of the images."""
    if rng.random() < 0.07:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.08:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(
            0, rng.uniform(1, 9), (image.height, image.width)
        )
        image = Image.fromarray(
            (np.asarray(image, np.float32) + noise).clip(0, 255).astype(np.uint8)
        )
    if rng.random() < 0.06:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(40, 90))
        image = Image.open(buffer).convert("L")
    return image


class Labels:
    """Collects the text of a page and the place of each of its characters."""

    def __init__(self, page: Page, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns
        self.scale_x = columns / page.width
        self.scale_y = rows / page.height  # pixels to cells
        self.slots = np.zeros((rows * columns, SLOTS), np.uint8)
        self.text = ""
        self.places: list[int | None] = []  # None: a space or a line break
        self.last_line: int | None = None
        for segment in page.segments:
            if not segment.silent:
                self.add(segment)

    def add(self, segment: Segment) -> None:
        if self.last_line is not None:
            self.text += " " if segment.line == self.last_line else "\n"
            self.places.append(None)
        self.last_line = segment.line
        ascent, _ = segment.font.getmetrics()
        y = segment.top + ascent - 0.3 * segment.font.size
        x = segment.x
        for character in segment.text:
            width = advance(segment.font, character)
            self.add_character(character, x + width / 2, y)
            x += width

    def add_character(self, character: str, x: float, y: float) -> None:
        row = min(max(y * self.scale_y, 0), self.rows - 0.01)
        column = min(max(x * self.scale_x, 0), self.columns - 0.01)
        cell = int(row) * self.columns + int(column)
        slot = int(row % 1 * SLOT_ROWS) * SLOT_COLUMNS + int(column % 1 * SLOT_COLUMNS)
        if self.slots[cell, slot] in (0, CHARACTER_CLASS[" "]):
            self.slots[cell, slot] = CHARACTER_CLASS[character]
        self.text += character
        self.places.append(None if character == " " else cell * SLOTS + slot)

    def next_places(self) -> list[int]:
        """A space or a line break looks ahead to the next character; the end looks at the last
        one."""
        following = next((p for p in reversed(self.places) if p is not None), 0)
        ahead = [following]
        for place in reversed(self.places):
            following = following if place is None else place
            ahead.append(following)
        return ahead[::-1]

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes, and a place for each: a character of several bytes repeats its place."""
        *places, end = self.next_places()
        lengths = [len(c.encode()) for c in self.text]
        return (
            np.array([*self.text.encode(), TOKEN["<|im_end|>"]], np.int64),
            np.append(np.repeat(np.array(places, np.int64), lengths), end),
        )


def sample(rng: random.Random, kind_name: str, look: Look, rows: int, columns: int) -> Sample:
    page = lay_out(rng, kind_name, look, rows, columns)
    image = wear(rng, draw(page, *colours(rng, look)))
    if image.size != (columns * CELL, rows * CELL):
        image = image.resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC)
    labels = Labels(page, rows, columns)
    answer, places = labels.answer()
    return Sample(np.asarray(image), labels.text, labels.slots, answer, places)
