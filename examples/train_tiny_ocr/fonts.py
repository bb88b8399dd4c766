"""The fonts that text is drawn in: Debian's, by file name, and Pillow's own."""

import random
from functools import cache
from pathlib import Path

from lists import listed
from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

PILLOW_DEFAULT = "pillow-default"
COMMON = listed("fonts", "common")
OTHER = listed("fonts", "other")
COMMON_SHARE = 0.92


@cache
def font_paths() -> dict[str, Path]:
    return {
        path.stem: path
        for path in sorted(Path("/usr/share/fonts").rglob("*.[to]t[fc]"), reverse=True)
    }


@cache
def installed(common: bool) -> list[str]:
    found = [name for name in (COMMON if common else OTHER) if name in font_paths()]
    if not found:
        raise ValueError(
            "no font of the recipe is installed: apt-get install the font packages that README.md "
            "names"
        )
    return [*found, PILLOW_DEFAULT] if common else found


@cache
def font_at(name: str, px: int) -> FreeTypeFont:
    if name == PILLOW_DEFAULT:
        return ImageFont.load_default(px)
    return ImageFont.truetype(str(font_paths()[name]), px, layout_engine=ImageFont.Layout.BASIC)


@cache
def advance(font: FreeTypeFont, character: str) -> float:
    """Width of one character; kerning is left out, a cell is wide against it."""
    return font.getlength(character)


def pick_font(rng: random.Random) -> str:
    return rng.choice(installed(rng.random() < COMMON_SHARE))
