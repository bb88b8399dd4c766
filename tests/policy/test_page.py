"""The page builds elements and sets texts: nothing that a model writes can become markup."""

import re
from pathlib import Path

import pytest

from tests.policy.sources import ROOT

STATIC = ROOT / "services" / "gateway" / "ui" / "static"
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment"
    r"|\beval\b|\bFunction\(|\bon[a-z]+\s*=|javascript:|\sstyle=|<style|<script(?![^>]*\ssrc=)"
)
ELSEWHERE = re.compile(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.-]+\.\w+")
"""An address of another host. The one that is left out is the name of SVG."""
TOPICS = {"api.js": "fetch("}
"""What only this file may do."""


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda file: file.name)
def test_a_file_of_the_page_is_harmless(file: Path) -> None:
    text = file.read_text()
    assert FORBIDDEN.findall(text) == []
    assert ELSEWHERE.findall(text) == []
    assert not any(topic in text for name, topic in TOPICS.items() if name != file.name)


@pytest.mark.parametrize(
    "line",
    [
        'x.innerHTML = "a"',
        "x.insertAdjacentHTML(",
        "document.write(",
        "eval(",
        'new Function("x")',
        "<a onclick=f()>",
        "button.onclick = f",
        '<p style="color: red">',
        "<script>f()</script>",
    ],
)
def test_a_harmful_line_is_found(line: str) -> None:
    assert FORBIDDEN.search(line)


@pytest.mark.parametrize("line", ["https://cdn.example.com/x.js", '"//example.com/x.css"'])
def test_an_address_elsewhere_is_found(line: str) -> None:
    assert ELSEWHERE.search(line)


THEMES = re.findall(r":root \{(.*?)\}", (STATIC / "page.css").read_text(), re.DOTALL)
"""The colours of the light theme and of the dark one."""
READABLE = [
    *(("text", "back"), ("text", "surface"), ("muted", "back"), ("muted", "surface")),
    *(("accent", "surface"), ("accent", "back"), ("on-accent", "accent")),
    *((state, "surface") for state in ("ready", "starting", "draining", "dead")),
]


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
@pytest.mark.parametrize(("front", "back"), READABLE, ids=lambda name: name)
def test_texts_have_the_contrast_that_wcag_asks_for(theme: str, front: str, back: str) -> None:
    colors = dict(re.findall(r"--([\w-]+): (#\w+);", theme))
    bright, dim = sorted((luminance(colors[name]) for name in (front, back)), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 4.5


def luminance(color: str) -> float:
    """Return the relative luminance of a colour such as #fff, as WCAG defines it."""
    digits = color.removeprefix("#")
    size = len(digits) // 3
    parts = [int(digits[n : n + size] * (3 - size), 16) / 255 for n in range(0, 3 * size, size)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
