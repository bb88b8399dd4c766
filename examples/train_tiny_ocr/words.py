"""What the images say: words, numbers, prices, dates and codes, one after another."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fonts import advance
from lists import listed
from PIL.ImageFont import FreeTypeFont
from settings import CHARACTERS

Writer = Callable[[random.Random], str]

EVERYDAY = listed("words", "everyday")
PHRASES = listed("words", "phrases")
MONTHS = listed("words", "months")
UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUOTES = ["({})", '"{}"', "'{}'", "[{}]", "*{}*", "<{}>", "{{{}}}"]


@cache
def dictionary() -> list[str]:
    words = Path("/usr/share/dict/words").read_text().split()
    return [word for word in words if word.isascii() and len(word) < 15]


def word(rng: random.Random) -> str:
    chosen = rng.choice(EVERYDAY) if rng.random() < 0.4 else rng.choice(dictionary())
    r = rng.random()
    return chosen if r < 0.64 else chosen.capitalize() if r < 0.85 else chosen.upper()


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def price(rng: random.Random) -> str:
    r = rng.random()
    length = rng.choice([1, 1, 1, 2, 2, 2, 3])
    body = f"{rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)}.{digits(rng, 2)}"
    if r < 0.45:
        return body
    if r < 0.85:
        return "$" + body
    return body.replace(".", ",") if r < 0.9 else rng.choice(["£", "€", "-", "-$", "USD "]) + body


def date(rng: random.Random) -> str:
    y = rng.randrange(1990, 2035)
    m = rng.randrange(1, 13)
    d = rng.randrange(1, 29)
    numbers = [
        f"{y}-{m:02}-{d:02}",
        f"{m:02}/{d:02}/{y}",
        f"{d:02}.{m:02}.{y}",
        f"{m}/{d}/{y % 100:02}",
    ]
    return rng.choice([*numbers, f"{rng.choice(MONTHS)} {d}, {y}", f"{d} {rng.choice(MONTHS)} {y}"])


def clock(rng: random.Random) -> str:
    h = rng.randrange(24)
    m = rng.randrange(60)
    half = rng.choice(["AM", "PM", "am", "pm"])
    return rng.choice(
        [f"{h:02}:{m:02}", f"{h % 12 + 1}:{m:02} {half}", f"{h:02}:{m:02}:{rng.randrange(60):02}"]
    )


def code(rng: random.Random) -> str:
    r = rng.random()
    if r < 0.3:
        letters = "".join(rng.choice(UPPER) for _ in range(rng.randrange(1, 4)))
        return letters + rng.choice(["-", "", " "]) + digits(rng, rng.randrange(2, 6))
    if r < 0.5:
        return "#" + digits(rng, rng.randrange(2, 7))
    if r < 0.75:
        return ("" if r >= 0.65 else f"({digits(rng, 3)}) ") + f"{digits(rng, 3)}-{digits(rng, 4)}"
    if r < 0.85:
        return f"{rng.choice(EVERYDAY)}@{rng.choice(EVERYDAY)}.{rng.choice(['com', 'org', 'net'])}"
    return "".join(
        rng.choice(UPPER + UPPER.lower() + "0123456789") for _ in range(rng.randrange(3, 9))
    )


def marked_word(rng: random.Random) -> str:
    r = rng.random()
    if r < 0.12:
        return word(rng) + rng.choice(",,,..:;!?")
    if r < 0.15:
        return rng.choice(QUOTES).format(word(rng))
    return word(rng) + rng.choice("-/&_+=") + word(rng) if r < 0.17 else word(rng)


def sign(rng: random.Random) -> str:
    return rng.choice(
        [
            f"{rng.randrange(101)}%",
            "&",
            "-",
            "@",
            "+",
            "=",
            f"No. {rng.randrange(99)}",
            "#1",
            "...",
            "|",
            "/",
        ]
    )


def gibberish(rng: random.Random) -> str:
    return "".join(rng.choice(CHARACTERS[1:]) for _ in range(rng.randrange(1, 8)))


TOKENS: dict[Writer, float] = {
    marked_word: 0.66,
    lambda rng: digits(rng, rng.randrange(1, 6)): 0.1,
    price: 0.07,
    date: 0.04,
    clock: 0.02,
    code: 0.04,
    sign: 0.02,
    gibberish: 0.05,
}


def token(rng: random.Random) -> str:
    """Anything that print may hold: a third of it is no word, so spelling alone does not help the
    reader."""
    return rng.choices(list(TOKENS), list(TOKENS.values()))[0](rng)


class Prose:
    """Sentences in shape only: words in lower case, commas, full stops, a capital after each."""

    def __init__(self) -> None:
        self.opening = True

    def __call__(self, rng: random.Random) -> str:
        r = rng.random()
        if r < 0.05:
            return rng.choice([digits(rng, rng.randrange(1, 5)), price(rng), date(rng), clock(rng)])
        text = rng.choice(EVERYDAY) if rng.random() < 0.6 else rng.choice(dictionary())
        text = text.capitalize() if self.opening else text
        self.opening = r > 0.9
        return text + rng.choice("...?!") if self.opening else text + "," if r > 0.83 else text


def line_that_fits(
    rng: random.Random, font: FreeTypeFont, width: float, writer: Writer = token, most: int = 99
) -> str:
    """Tokens until three in a row would not fit; may be empty when nothing fits."""
    if rng.random() < 0.06 and font.getlength(phrase := rng.choice(PHRASES)) <= width:
        return phrase
    tokens = []
    used = 0.0
    while len(tokens) < most:
        for _ in range(3):
            new = writer(rng)
            extra = sum(advance(font, c) for c in (" " + new if tokens else new))
            if used + extra <= width:
                break
        else:
            break
        tokens.append(new)
        used += extra
    return " ".join(tokens)
