"""Where text lies on an image: lines, receipts, and pages with headings."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from fonts import font_at
from PIL.ImageFont import FreeTypeFont
from receipts import ReceiptLine, receipt_lines
from words import Prose, Writer, digits, line_that_fits, token

PROSE_SHARE = 0.3


@dataclass
class Segment:
    """A piece of a line; the segments of one line are read from left to right."""

    line: int
    x: float
    top: float
    text: str
    font: FreeTypeFont
    inverse: bool = False  # in the paper's colour, on a band in the ink's
    silent: bool = False  # drawn, but not read out


@dataclass
class Page:
    width: int
    height: int
    segments: list[Segment] = field(default_factory=list)
    # Left, y, right, thickness.
    rules: list[tuple[float, float, float, int]] = field(default_factory=list)
    bands: list[tuple[float, float]] = field(default_factory=list)  # top, bottom

    def add(
        self, line: int, x: float, top: float, text: str, font: FreeTypeFont, **flags: bool
    ) -> None:
        if text:
            self.segments.append(Segment(line, x, top, text, font, **flags))


@dataclass(frozen=True)
class Plan:
    """One image's font and lines."""

    font: str
    px: int
    fewest: int
    most: int
    filled: bool  # lines run to the right edge


Layout = Callable[[random.Random, Page, Plan], None]


def pick_writer(rng: random.Random) -> Writer:
    return Prose() if rng.random() < PROSE_SHARE else token


def centered(page: Page, font: FreeTypeFont, text: str) -> float:
    return max(1, (page.width - font.getlength(text)) / 2)


def line_text(
    rng: random.Random, font: FreeTypeFont, width: float, filled: bool, writer: Writer
) -> str:
    wanted = width if filled else width * rng.uniform(0.3, 1.0)
    text = line_that_fits(rng, font, wanted, writer, 99 if filled else rng.choice([1, 2, 3, 4, 9]))
    return text or line_that_fits(rng, font, width, writer) or digits(rng, rng.randint(1, 2))


def lay_lines(rng: random.Random, page: Page, plan: Plan) -> None:
    font = font_at(plan.font, plan.px)
    writer = pick_writer(rng)
    free = page.height - plan.px * 1.2
    pitch = plan.px * rng.uniform(1.12, 1.6)
    left = rng.uniform(1, 14) if rng.random() < 0.8 else rng.uniform(1, 0.25 * page.width)
    count = min(max(1, int(free // pitch) + 1), rng.randint(plan.fewest, plan.most))
    pitch = min(pitch, free / (count - 1)) if count > 1 else pitch
    slack = max(0.0, free - (count - 1) * pitch)
    top = rng.uniform(0, slack) if rng.random() < 0.7 else min(4, slack)
    in_the_middle = rng.random() < 0.15
    for i in range(count):
        text = line_text(rng, font, page.width - left - 2, plan.filled, writer)
        page.add(
            i, centered(page, font, text) if in_the_middle else left, top + i * pitch, text, font
        )


def shortened(text: str, font: FreeTypeFont, limit: float, by_words: bool) -> str:
    while font.getlength(text) > limit and len(text) > 2:
        text = text.rsplit(" ", 1)[0] if by_words and " " in text else text[:-1]
    return text.strip()


def lay_receipt_line(
    page: Page, i: int, y: float, line: ReceiptLine, font: FreeTypeFont, left: float, inline: bool
) -> None:
    right = page.width - left
    limit = right - left - (font.getlength(line.price) + 8 if line.price else 0)
    text = shortened(line.text, font, limit, not line.silent)
    if line.price and inline:
        text = f"{text} {line.price}"
    page.add(
        i, centered(page, font, text) if line.centered else left, y, text, font, silent=line.silent
    )
    if line.price and not inline:
        page.add(i, right - font.getlength(line.price), y, line.price, font)


def lay_receipt(rng: random.Random, page: Page, plan: Plan) -> None:
    font = font_at(plan.font, plan.px)
    count = max(
        3, min(rng.randint(plan.fewest, plan.most), int((page.height - 4) // (plan.px * 1.12)))
    )
    left = rng.uniform(2, 16)
    lines = receipt_lines(rng, count)
    free = page.height - plan.px * 1.25
    pitch = min(plan.px * rng.uniform(1.12, 1.6), free / (count - 1))
    slack = max(0.0, free - (count - 1) * pitch)
    top = rng.uniform(0, slack) if rng.random() < 0.6 else min(6, slack)
    all_left = rng.random() < 0.2
    inline = rng.random() < 0.2
    for i, line in enumerate(lines):
        line.centered = line.centered and not all_left
        lay_receipt_line(page, i, top + i * pitch, line, font, left, inline)
    if rng.random() < 0.15:  # a drawn rule between two lines says nothing
        y = top + rng.randrange(1, count) * pitch - 0.5
        page.rules.append((left, y, page.width - left, rng.choice([1, 1, 2])))


def lay_heading(rng: random.Random, page: Page, plan: Plan, left: float) -> float:
    """A larger first line, at times light on a dark band -> where the rest begins"""
    px = min(56, round(plan.px * rng.uniform(1.3, 2.8)))
    font = font_at(plan.font, px)
    text = line_text(
        rng, font, page.width - left - 4, False, Prose() if rng.random() < 0.5 else token
    )
    top = rng.uniform(2, 10)
    bottom = top + px * rng.uniform(1.25, 1.5)
    banded = rng.random() < 0.3
    if banded:
        page.bands.append((rng.choice([0.0, max(0.0, top - 4)]), bottom))
    page.add(
        0,
        centered(page, font, text) if rng.random() < 0.4 else left,
        top,
        text,
        font,
        inverse=banded,
    )
    return bottom + rng.uniform(0.1, 0.8) * plan.px


def lay_document(rng: random.Random, page: Page, plan: Plan) -> None:
    """Paragraphs down the page, often under a heading."""
    font = font_at(plan.font, plan.px)
    writer = pick_writer(rng)
    left = rng.uniform(2, 24)
    pitch = plan.px * rng.uniform(1.12, 1.5)
    first = 1 if rng.random() < 0.6 else 0
    y = lay_heading(rng, page, plan, left) if first else rng.uniform(2, 16)
    width = page.width - left - rng.uniform(2, 16)
    paragraph_end = rng.choice([0.0, 0.1, 0.25])
    for i in range(first, rng.randint(plan.fewest, plan.most)):
        if y + plan.px * 1.2 > page.height:
            return
        ends = rng.random() < paragraph_end
        page.add(i, left, y, line_text(rng, font, width, not ends, writer), font)
        y += pitch * (rng.uniform(1.2, 1.8) if ends else 1)
