"""The tests of olmOCR-bench on answers that were made for them."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.commands.evaluation.olmocr.checks import ANY_CHECK

MARKDOWN_TABLE = """
Before.

| | Size | **Price** |
|---|:--|---|
| Tea | small | 1.50 |
| Milk — | large | 2.75 |
"""
HTML_TABLE = """<table>
<thead><tr><th rowspan="2">Year</th><th colspan="2">Rain</th></tr>
<tr><th>May</th><th>June</th></tr></thead>
<tr><td>1999</td><td>11</td><td>12</td></tr>
<tr><td rowspan="2">2000</td><td>21</td><td>22</td></tr>
<tr><td>31</td><td>32</td></tr>
</table>"""
PLAIN_HTML_TABLE = "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>"


def failure(answer: str, **fields: Any) -> str:
    check = ANY_CHECK.validate_python({"pdf": "a.pdf", "page": 1, "id": "1"} | fields)
    return check.failure(answer)


def passes(answer: str, **fields: Any) -> bool:
    return failure(answer, **fields) == ""


@pytest.mark.parametrize(
    ("answer", "fields", "is_present"),
    [
        ("one two  three", {"text": "two three"}, True),
        ("one twx three", {"text": "two three"}, False),
        ("one twx three", {"text": "two three", "max_diffs": 1}, True),
        ("ONE", {"text": "one"}, False),
        ("ONE", {"text": "One", "case_sensitive": False}, True),
        ("**o**ne _t_wo<br/><b>three</b>", {"text": "one two three"}, True),
        ("it’s “one” – two", {"text": 'it\'s "one" - two'}, True),
        ("cafe\u0301 5 \u00b5m", {"text": "café 5 μm"}, True),
        ("one two three", {"text": "three", "first_n": 7}, False),
        ("one two three", {"text": "three", "last_n": 7}, True),
        ("one two three", {"text": "one", "last_n": 5}, False),
        ("one two three", {"text": "onee", "first_n": 3, "last_n": 1}, True),
        ("", {"text": "one"}, False),
    ],
)
def test_a_text_is_present_or_absent(answer: str, fields: dict[str, Any], is_present: bool) -> None:
    assert passes(answer, type="present", **fields) == is_present
    assert passes(answer, type="absent", **fields) != is_present


@pytest.mark.parametrize(
    ("answer", "fields", "reason"),
    [
        ("one two three", {}, ""),
        ("three two one", {}, "nowhere before"),
        ("three one two three", {}, ""),
        ("one two", {}, "'three' is missing"),
        ("onx two thrxe", {}, "'one' is missing"),
        ("onx two thrxe", {"max_diffs": 1}, ""),
    ],
)
def test_one_text_is_before_another(answer: str, fields: dict[str, Any], reason: str) -> None:
    found = failure(answer, type="order", before="one", after="three", **fields)
    assert found.endswith(reason) if not reason else reason in found


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        (MARKDOWN_TABLE, {"cell": "small", "up": "Size", "down": "large", "right": "1.50"}),
        (MARKDOWN_TABLE, {"cell": "2.75", "left": "large", "top_heading": "Price"}),
        (MARKDOWN_TABLE, {"cell": "2.75", "left_heading": "Milk -"}),
        (MARKDOWN_TABLE, {"cell": "smell", "max_diffs": 1}),
        (HTML_TABLE, {"cell": "Year", "right": "May", "down": "1999"}),
        (HTML_TABLE, {"cell": "Rain", "down": "June"}),
        (HTML_TABLE, {"cell": "June", "up": "Rain", "left": "May"}),
        (HTML_TABLE, {"cell": "32", "top_heading": "Rain"}),
        (HTML_TABLE, {"cell": "32", "top_heading": "June", "left_heading": "2000"}),
        (HTML_TABLE, {"cell": "2000", "right": "31"}),
        (HTML_TABLE, {"cell": "31", "left": "2000", "up": "21"}),
        (PLAIN_HTML_TABLE, {"cell": "d", "top_heading": "b", "left_heading": "c"}),
        (MARKDOWN_TABLE + HTML_TABLE, {"cell": "31", "right": "32"}),
    ],
)
def test_a_table_has_a_cell_with_these_neighbours(table: str, fields: dict[str, Any]) -> None:
    assert failure(table, type="table", **fields) == ""


@pytest.mark.parametrize(
    ("table", "fields", "reason"),
    [
        ("no table", {"cell": "small"}, "no table has a cell 'small'"),
        ("| one | line |", {"cell": "one"}, "no table"),
        (MARKDOWN_TABLE, {"cell": "smell"}, "no table has a cell 'smell'"),
        (MARKDOWN_TABLE, {"cell": "small", "up": "Price"}, "'Price' on its side 'up'"),
        (MARKDOWN_TABLE, {"cell": "small", "ignore_markdown_tables": True}, "no table"),
        (MARKDOWN_TABLE, {"cell": "2.75", "left_heading": "Tea"}, "the heading 'Tea'"),
        (HTML_TABLE, {"cell": "32", "top_heading": "May"}, "the heading 'May'"),
        (HTML_TABLE, {"cell": "1999", "down": "21"}, "'21' on its side 'down'"),
    ],
)
def test_a_table_lacks_what_is_wanted(table: str, fields: dict[str, Any], reason: str) -> None:
    assert reason in failure(table, type="table", **fields)


@pytest.mark.parametrize(
    ("answer", "fields", "reason"),
    [
        ("A page.", {}, ""),
        (" \n-- **", {}, "no letter"),
        ("A page." + 31 * "ab ", {}, "repeats"),
        ("A page." + 30 * "ab ", {}, ""),
        ("A page. \U0001f600", {}, "'\U0001f600'"),
        ("A page. 日", {"check_disallowed_characters": False}, ""),
        ("", {"max_length": 10}, ""),
        ("12345 78901", {"max_length": 10}, ""),
        ("12345 789012", {"max_length": 10}, "read as 11 letters"),
        ("![a long text](image.png)", {"max_length": 3}, "letters"),
        (
            "![a long text](image.png)",
            {"max_length": 3, "max_length_skips_image_alt_tags": True},
            "",
        ),
    ],
)
def test_an_answer_is_plausible(answer: str, fields: dict[str, Any], reason: str) -> None:
    found = failure(answer, type="baseline", **fields)
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("answer", "format", "passed"),
    [
        ("## The title\nText", "heading", True),
        ("<h2>The\ntitle</h2>", "heading", True),
        ("The title\n# Text", "heading", False),
        ("a **The title** b", "bold", True),
        ("a <strong>The title</strong> b", "bold", True),
        ("a *The title* b", "bold", False),
        ("a *The title* b", "italic", True),
        ("a **The title** b", "italic", False),
        ("a <em>The title</em> b", "italic", True),
    ],
)
def test_a_text_has_a_format(answer: str, format: str, passed: bool) -> None:
    assert passes(answer, type="format", text="The title", format=format) == passed


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("the end.[^3] Then more", True),
        ("the end<sup>3</sup> then more", True),
        ("the end³ then more", True),
        ("the end3 then more", False),
        ("then more[^3] the end", False),
        ("the end\n\n[^3]: then more", False),
    ],
)
def test_a_footnote_mark_is_between_two_texts(answer: str, passed: bool) -> None:
    near = {"appears_before_marker": "the end", "appears_after_marker": "Then"}
    assert passes(answer, type="footnote", marker="3", **near) == passed


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "present", "text": " "},
        {"type": "order", "before": "abcd", "after": "abcdefgh", "max_diffs": 3},
        {"type": "other"},
        {"type": "present", "text": "a", "unknown": 1},
        {"type": "math", "math": " "},
        {"type": "present", "text": "a", "pdf": "../a.pdf"},
        {"type": "present", "text": "a", "pdf": "/a.pdf"},
    ],
)
def test_a_test_that_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        failure("", **fields)
