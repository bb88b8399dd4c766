"""Draw the sample images of the examples folder: the receipt, and a few others with their texts.

python draw_samples.py ..
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from fonts import font_at
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    text: str
    right: str = ""  # at the right edge
    px: int = 20
    bold: bool = False
    centered: bool = False
    gap: int = 0  # above
    rule: bool = False  # in the middle of the gap

    def spoken(self) -> str:
        return f"{self.text} {self.right}" if self.right else self.text


@dataclass(frozen=True)
class Sheet:
    name: str
    size: tuple[int, int]
    rows: list[Row]
    fonts: tuple[str, str] = ("LiberationSans-Regular", "LiberationSans-Bold")
    paper: Colour = (252, 250, 245)
    ink: Colour = (38, 36, 42)
    margin: int = 20
    leading: float = 1.3

    def text(self) -> str:
        return "\n".join(row.spoken() for row in self.rows)


RECEIPT = Sheet(
    "receipt",
    (336, 336),
    [
        Row("CORNER BAKERY", px=26, bold=True, centered=True),
        Row("28 Park Road", centered=True),
        Row("12.03.2026 08:45", centered=True),
        Row("2 Croissant", "5.60", gap=14, rule=True),
        Row("1 Apple Cake", "4.25"),
        Row("2 Espresso", "6.40"),
        Row("1 Orange Juice", "3.50"),
        Row("TOTAL", "19.75", px=22, bold=True, gap=14, rule=True),
        Row("Cash", "20.00"),
        Row("Thank you for your visit!", centered=True, gap=10),
    ],
    fonts=("LiberationMono-Regular", "LiberationMono-Bold"),
    margin=22,
)
SIGN = Sheet(
    "sign",
    (392, 168),
    [
        Row("FRESH BREAD", px=44, bold=True, centered=True, gap=8),
        Row("every morning from 7:00", px=24, centered=True, gap=8),
    ],
    fonts=("DejaVuSans", "DejaVuSans-Bold"),
    paper=(24, 74, 60),
    ink=(250, 246, 230),
)
LETTER = Sheet(
    "letter",
    (420, 224),
    [
        Row("Dear Ms. Porter,", px=24),
        Row("the parcel left our warehouse", px=24, gap=8),
        Row("on 4 March and should reach", px=24),
        Row("you by Friday.", px=24),
        Row("Regards, Tom", px=24, gap=8),
    ],
    fonts=("LiberationSerif-Regular", "LiberationSerif-Bold"),
)
INVOICE = Sheet(
    "invoice",
    (448, 252),
    [
        Row("Invoice 2047", px=38, bold=True),
        Row("Due date: 30 June 2026", gap=4),
        Row("2 desk lamps", "79.00", gap=14, rule=True),
        Row("1 office chair", "145.50"),
        Row("Delivery", "12.00"),
        Row("Amount due", "236.50", bold=True, gap=14, rule=True),
    ],
)
SAMPLES = [SIGN, LETTER, INVOICE]


def draw(sheet: Sheet) -> Image.Image:
    image = Image.new("RGB", sheet.size, sheet.paper)
    canvas = ImageDraw.Draw(image)
    width = sheet.size[0]
    y = 14.0
    for row in sheet.rows:
        if row.rule:
            middle = y + row.gap // 2 - 2
            canvas.line((sheet.margin, middle, width - sheet.margin, middle), fill=sheet.ink)
        y += row.gap
        font = font_at(sheet.fonts[row.bold], row.px)
        x = (width - font.getlength(row.text)) / 2 if row.centered else sheet.margin
        canvas.text((x, y), row.text, font=font, fill=sheet.ink)
        canvas.text(
            (width - sheet.margin - font.getlength(row.right), y),
            row.right,
            font=font,
            fill=sheet.ink,
        )
        y += row.px * sheet.leading
    return image


def save(sheet: Sheet, folder: Path) -> None:
    # a palette halves the file; 32 tones of one ink on one paper lose nothing visible
    draw(sheet).quantize(32).save(folder / f"{sheet.name}.png", optimize=True)


def main() -> None:
    if len(sys.argv) != 2:
        raise ValueError("usage: python draw_samples.py FOLDER")
    folder = Path(sys.argv[1])
    save(RECEIPT, folder)
    (folder / "receipt.txt").write_text(RECEIPT.text() + "\n")
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    for sheet in SAMPLES:
        save(sheet, samples)
    listed = [{"file": f"{sheet.name}.png", "text": sheet.text()} for sheet in SAMPLES]
    (samples / "samples.json").write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
