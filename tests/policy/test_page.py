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
