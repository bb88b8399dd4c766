"""The tests of olmOCR-bench, and whether an answer passes one.

A test is one line of a .jsonl file. The kinds, their fields and their verdicts are those of
olmOCR's bench (Apache-2.0, github.com/allenai/olmocr, commit f7cfe4c, olmocr/bench/tests.py). Math
is in `equations.py`, because it needs a browser.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Literal

from fuzzysearch import find_near_matches
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from rapidfuzz import fuzz

from services.commands.evaluation.olmocr.tables import (
    DOWN,
    LEFT,
    RIGHT,
    UP,
    Place,
    Table,
    find_tables,
)
from services.commands.evaluation.olmocr.text import (
    UNUSUAL,
    contains,
    normalise,
    num_letters,
    repetitions,
    tolerance,
)

PASSED = ""
"""What a check returns if the answer passes; otherwise the reason why not."""
MOST_REPETITIONS = 30
LEAST_CELL_SIMILARITY = 0.5
FOOTNOTE_REACH = 200
"""A footnote's text is looked for among this many characters next to its mark."""
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
FORMATS = {
    "heading": (r"(?m)^#{1,6}\s+(.+?)$", r"(?is)<h[1-6][^>]*>(.*?)</h[1-6]>"),
    "bold": (
        r"(?s)\*\*(.*?)\*\*",
        r"(?s)__(.*?)__",
        r"(?is)<b[^>]*>(.*?)</b>",
        r"(?is)<strong[^>]*>(.*?)</strong>",
    ),
    "italic": (
        r"(?s)(?<!\*)\*(?!\*)(.*?)(?<!\*)\*(?!\*)",
        r"(?s)(?<!_)_(?!_)(.*?)(?<!_)_(?!_)",
        r"(?is)<i[^>]*>(.*?)</i>",
        r"(?is)<em[^>]*>(.*?)</em>",
    ),
}
"""How Markdown and HTML write the formatted text, by format."""


def _inside(path: str) -> str:
    """Return the path of a file in a folder; an error if it leads out of the folder."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or parts[0].startswith("/"):
        raise ValueError("expected the path of a PDF in the folder of PDFs")
    return path


class Check(BaseModel):
    """What all tests have: the page that they are about, and an id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str
    id: Annotated[str, Field(min_length=1)]
    pdf: Annotated[str, AfterValidator(_inside)]
    """Its path in the folder of PDFs."""
    page: Annotated[int, Field(ge=1)]
    max_diffs: Annotated[int, Field(ge=0)] = 0
    checked: Literal["verified", "rejected"] | None = None
    url: str | None = None

    def failure(self, answer: str) -> str:
        """Return why the answer fails the test; empty if it passes."""
        raise NotImplementedError


def _something(text: str) -> str:
    """Return the normalised text; an error if nothing is left."""
    text = normalise(text)
    if not text.strip():
        raise ValueError("the text is empty")
    return text


Normal = Annotated[str, AfterValidator(normalise)]
Text = Annotated[str, AfterValidator(_something)]


class Presence(Check):
    """Whether a text, or one much like it, is in the answer or is not."""

    type: Literal["present", "absent"]
    text: Text
    case_sensitive: bool = True
    first_n: int | None = None
    last_n: int | None = None

    def failure(self, answer: str) -> str:
        wanted = self.text
        answer = normalise(answer)
        if not self.case_sensitive:
            wanted = wanted.lower()
            answer = answer.lower()
        is_present = contains(self._part(answer), wanted, self.max_diffs)
        if is_present == (self.type == "present"):
            return PASSED
        return f"{wanted!r} is {'there' if is_present else 'missing'}"

    def _part(self, answer: str) -> str:
        """Return the beginning, the end, or both, if only they count."""
        if not (self.first_n or self.last_n):
            return answer
        beginning = answer[: self.first_n] if self.first_n else ""
        end = answer[-self.last_n :] if self.last_n else ""
        return beginning + end


class Order(Check):
    """Whether one text is somewhere before another."""

    type: Literal["order"]
    before: Text
    after: Text

    @model_validator(mode="after")
    def _check_max_diffs(self) -> "Order":
        if self.max_diffs > min(len(self.before), len(self.after)) // 2:
            raise ValueError("max_diffs is more than half of a text's length")
        return self

    def failure(self, answer: str) -> str:
        answer = normalise(answer)
        places = {}
        for wanted in (self.before, self.after):
            matches = find_near_matches(wanted, answer, max_l_dist=self.max_diffs)
            if not matches:
                return f"{wanted!r} is missing"
            places[wanted] = [match.start for match in matches]
        if min(places[self.before]) < max(places[self.after]):
            return PASSED
        return f"{self.before!r} is nowhere before {self.after!r}"


class Neighbourhood(Check):
    """Whether some table has a cell with these neighbours and headings."""

    type: Literal["table"]
    cell: Normal
    up: Normal = ""
    down: Normal = ""
    left: Normal = ""
    right: Normal = ""
    top_heading: Normal = ""
    left_heading: Normal = ""
    ignore_markdown_tables: bool = False

    def failure(self, answer: str) -> str:
        reason = f"no table has a cell {self.cell!r}"
        for table in find_tables(answer, in_markdown=not self.ignore_markdown_tables):
            for name in table.cells:
                if self._is_like(table, name, self.cell):
                    missing = self._missing(table, name)
                    if not missing:
                        return PASSED
                    reason = f"{self.cell!r} does not have {missing}"
        return reason

    def _missing(self, table: Table, name: Place) -> str:
        """Return the first wanted neighbour or heading that the cell does not have."""
        for side, direction in (("up", UP), ("down", DOWN), ("left", LEFT), ("right", RIGHT)):
            wanted = getattr(self, side)
            near = table.neighbours(name, direction) if wanted else ()
            if wanted and not any(self._is_like(table, other, wanted) for other in near):
                return f"{wanted!r} on its side {side!r}"
        for wanted, direction in ((self.left_heading, LEFT), (self.top_heading, UP)):
            near = table.headings(name, direction) if wanted else ()
            if wanted and not any(self._is_like(table, other, wanted) for other in near):
                return f"the heading {wanted!r}"
        return ""

    def _is_like(self, table: Table, name: Place, wanted: str) -> bool:
        least = max(LEAST_CELL_SIMILARITY, tolerance(wanted, self.max_diffs))
        return fuzz.ratio(wanted, normalise(table.cells[name].text)) / 100 >= least


class Baseline(Check):
    """Whether the answer is plausible at all: not empty, no loop, no foreign script.

    With `max_length`, the page is blank, and the answer must have at most that many letters.
    """

    type: Literal["baseline"]
    max_length: int | None = None
    max_length_skips_image_alt_tags: bool = False
    max_repeats: int = MOST_REPETITIONS
    check_disallowed_characters: bool = True

    def failure(self, answer: str) -> str:
        if self.max_length is not None:
            return self._blank_failure(answer, self.max_length)
        if not num_letters(answer):
            return "the answer has no letter and no digit"
        if max(repetitions(answer)) > self.max_repeats:
            return f"the end repeats itself over {self.max_repeats} times"
        if self.check_disallowed_characters and (found := UNUSUAL.search(answer)):
            return f"the answer has the character {found[0]!r}"
        return PASSED

    def _blank_failure(self, answer: str, most: int) -> str:
        if self.max_length_skips_image_alt_tags:
            answer = re.sub(r"!\[.*?\]\(.*?\)", "", answer)
        count = num_letters(answer)
        return PASSED if count <= most else f"a blank page was read as {count} letters"


class Format(Check):
    """Whether a text is part of a heading, or of something bold or italic."""

    type: Literal["format"]
    text: Text
    format: Literal["heading", "bold", "italic"]
    case_sensitive: bool = True

    def failure(self, answer: str) -> str:
        wanted = self.text if self.case_sensitive else self.text.lower()
        for pattern in FORMATS[self.format]:
            for found in re.findall(pattern, answer):
                part = normalise(found)
                if not self.case_sensitive:
                    part = part.lower()
                if contains(part, wanted, self.max_diffs):
                    return PASSED
        return f"{self.text!r} is not written as {self.format}"


class Footnote(Check):
    """Whether a footnote's mark is there, as a superscript, next to the right texts."""

    type: Literal["footnote"]
    marker: Annotated[str, Field(pattern=r"^[^ ]+$")]
    appears_before_marker: Text | None = None
    appears_after_marker: Text | None = None

    def failure(self, answer: str) -> str:
        marks = list(self._marks(answer))
        if not marks:
            return f"there is no footnote mark {self.marker!r}"
        before = self.appears_before_marker
        if before and not any(
            self._is_near(before, answer[max(0, start - FOOTNOTE_REACH) : start], at_end=True)
            for start, _ in marks
        ):
            return f"{before!r} is not before a mark {self.marker!r}"
        after = self.appears_after_marker
        if after and not any(
            self._is_near(after, answer[end : end + FOOTNOTE_REACH], at_end=False)
            for _, end in marks
        ):
            return f"{after!r} is not after a mark {self.marker!r}"
        return PASSED

    def _marks(self, answer: str) -> Iterator[tuple[int, int]]:
        """Yield where each mark begins and ends."""
        marker = re.escape(self.marker)
        patterns = [rf"\[\^{marker}\](?!:)", rf"(?i)<sup[^>]*>{marker}</sup>"]
        if self.marker.isascii() and self.marker.isdigit():
            patterns.append(self.marker.translate(SUPERSCRIPTS))
        for pattern in patterns:
            yield from (match.span() for match in re.finditer(pattern, answer))

    def _is_near(self, wanted: str, part: str, at_end: bool) -> bool:
        letters = _letters(wanted)
        near = _letters(part)
        reach = 2 * len(letters) or len(near)
        near = near[max(0, len(near) - reach) :] if at_end else near[:reach]
        least = tolerance(wanted, self.max_diffs)
        return bool(near) and fuzz.partial_ratio(letters, near) / 100 >= least


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, normalise(text))).lower()


class Math(Check):
    """Whether the answer has an equation that looks like this one; `equations.py` decides it."""

    type: Literal["math"]
    math: Annotated[str, Field(pattern=r"\S")]
    ignore_dollar_delimited: bool = False


AnyCheck = Annotated[
    Presence | Order | Neighbourhood | Baseline | Format | Footnote | Math,
    Field(discriminator="type"),
]
ANY_CHECK: TypeAdapter[AnyCheck] = TypeAdapter(AnyCheck)
