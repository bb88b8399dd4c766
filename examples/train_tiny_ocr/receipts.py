"""The lines of a receipt: a shop, items with prices, totals, a farewell."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from lists import listed
from words import clock, code, date, digits, price, word

ITEMS = listed("receipts", "items")
QUALIFIERS = listed("receipts", "qualifiers")
STORES = listed("receipts", "stores")
LABELS = listed("receipts", "labels")
ENDINGS = listed("receipts", "endings")
HEADINGS = listed("receipts", "headings")


@dataclass
class ReceiptLine:
    text: str
    price: str = ""
    centered: bool = False
    silent: bool = False  # drawn, but not read out


def shop(rng: random.Random) -> str:
    owner = rng.choice([word(rng).capitalize() + " ", "", "The ", word(rng).capitalize() + "'s "])
    name = owner + rng.choice(STORES)
    name = name.upper() if rng.random() < 0.4 else name
    return name if rng.random() < 0.85 else rng.choice(["RECEIPT", "Receipt", "INVOICE", "Invoice"])


def address(rng: random.Random) -> str:
    return (
        f"{rng.randrange(1, 999)} {word(rng).capitalize()} "
        f"{rng.choice(['St', 'Ave', 'Rd', 'Street'])}"
    )


def heading(rng: random.Random) -> str:
    return (
        f"{rng.choice(HEADINGS)} {rng.choice([digits(rng, 3), code(rng), word(rng).capitalize()])}"
    )


def moment(rng: random.Random) -> str:
    return f"{date(rng)} {clock(rng)}"


HEAD: list[Callable[[random.Random], str]] = [date, moment, code, address, heading]


def item(rng: random.Random) -> str:
    parts = [rng.choice(ITEMS)]
    if rng.random() < 0.45:
        parts.insert(rng.randrange(2), rng.choice(QUALIFIERS))
    if rng.random() < 0.2:
        count = rng.randrange(1, 10)
        parts.insert(0, rng.choice([f"{count}", f"{count}x", f"{count} x"]))
    if rng.random() < 0.15:
        parts = [word(rng) for _ in range(rng.randint(1, 2))]
    text = " ".join(parts)
    r = rng.random()
    return text.upper() if r < 0.3 else text.lower() if r < 0.36 else text


def head_lines(rng: random.Random, most: int) -> list[ReceiptLine]:
    lines = [ReceiptLine(shop(rng), centered=True)] if rng.random() < 0.85 else []
    for maker in HEAD:
        if rng.random() < 0.2 and len(lines) < most:
            lines.append(ReceiptLine(maker(rng), centered=rng.random() < 0.5))
    return lines


def tail_lines(rng: random.Random) -> list[ReceiptLine]:
    labels = sorted(rng.sample(range(len(LABELS)), rng.choice([0, 1, 1, 2, 3])))
    lines = [ReceiptLine(LABELS[i], price(rng)) for i in labels]
    if rng.random() < 0.4:
        lines.append(ReceiptLine(rng.choice(ENDINGS), centered=rng.random() < 0.67))
    return lines


def item_line(rng: random.Random) -> ReceiptLine:
    return ReceiptLine(item(rng), price(rng) if rng.random() < 0.93 else "")


def receipt_lines(rng: random.Random, count: int) -> list[ReceiptLine]:
    head = head_lines(rng, count - 2)
    tail = tail_lines(rng)
    if rng.random() < 0.15:  # a row of dashes says nothing
        row = ReceiptLine(rng.choice("--==*_") * rng.randint(10, 60), silent=True)
        head.append(row) if rng.random() < 0.5 else tail.insert(0, row)
    tail = tail[: max(0, count - len(head) - 1)]
    return head + [item_line(rng) for _ in range(count - len(head) - len(tail))] + tail
