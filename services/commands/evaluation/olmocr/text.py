"""Text as olmOCR-bench compares it: normalised, and matched approximately.

The rules and constants are those of olmOCR's bench (Apache-2.0, github.com/allenai/olmocr, commit
f7cfe4c, olmocr/bench/tests.py and olmocr/repeatdetect.py), because a test's verdict depends on
each of them.
"""

import re
import unicodedata

from rapidfuzz import fuzz

LIKENESS = str.maketrans(
    dict.fromkeys("‘’‚", "'")
    | dict.fromkeys("“”„", '"')
    | dict.fromkeys("–—‑‒−", "-")
    | {"＿": "_", "µ": "μ"}
)
"""Characters that count as the same as a plainer one."""
UNUSUAL = re.compile(
    "[\u4e00-\u9fff\u3040-\u309f\u30a0-\u30ff"
    "\U0001f600-\U0001f64f\U0001f300-\U0001f5ff\U0001f680-\U0001f6ff\U0001f1e0-\U0001f1ff]"
)
"""Chinese characters, Japanese syllables and pictographs, which no page of the bench has."""
LONGEST_REPEATED = 5


def normalise(text: str) -> str:
    """Return the text on one line, without emphasis, its quotes and dashes in their plain form."""
    text = re.sub("<br/?>", " ", text)
    text = _without_marks(text, "**")
    text = _without_marks(text, "__")
    text = re.sub("</?[bi]>", "", text)
    # Marks that enclosed other marks.
    text = _without_marks(text, "**", "__")
    text = _without_marks(text, "*", "_")
    text = re.sub(r"\s+", " ", text)
    return unicodedata.normalize("NFC", text).translate(LIKENESS)


def _without_marks(text: str, *marks: str) -> str:
    """Return the text without these marks in the places where a line has them around something."""
    either = "|".join(re.escape(mark) for mark in marks)
    return re.sub(f"({either})(.*?)\\1", r"\2", text)


def contains(text: str, wanted: str, max_diffs: int) -> bool:
    """Whether a part of the text is like the wanted one, but for about that number of edits."""
    return fuzz.partial_ratio(wanted, text) / 100 >= tolerance(wanted, max_diffs)


def tolerance(wanted: str, max_diffs: int) -> float:
    """Return the least similarity, from 0 to 1, that allows for this number of edits."""
    return 1 - max_diffs / max(1, len(wanted))


def num_letters(text: str) -> int:
    """Return the number of letters and digits in the text."""
    return sum(character.isalnum() for character in text)


def repetitions(text: str) -> list[int]:
    """Return how often the last 1, 2, ... 5 characters stand one after the other at the end."""
    text = re.sub(r"\s+", " ", text)
    return [_repetitions_of(text, size) for size in range(1, LONGEST_REPEATED + 1)]


def _repetitions_of(text: str, size: int) -> int:
    ending = text[-size:]
    count = 0
    while len(text) >= (count + 1) * size and text.endswith(ending, 0, len(text) - count * size):
        count += 1
    return count
