"""Which prompt a served model gets, as far as its name says what it is."""

import re
from collections.abc import Callable

FAMILIES = (
    (r"qwen[-_. ]?2(\.5)?[-_. ]?vl|rolmocr|olmocr|nanonets", "qwen2_vl"),
    (r"qwen[-_. ]?vl", "qwen_vl"),
    (r"wemm", "wemm"),
    (r"vlmo", "vlmo"),
)
"""What a model's name contains, and its family. The first match counts."""
QUESTION = "{question}"
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
"""VLMEvalKit's prompt for visual questions with short answers (vlmeval/dataset/image_vqa.py)."""


def family_of(model: str) -> str:
    """Return the family that a model's name shows, or "" if it shows none."""
    name = model.lower()
    return next((family for pattern, family in FAMILIES if re.search(pattern, name)), "")


def by_family(generic: str, **families: str) -> Callable[[str], str]:
    """Return a function from a model's name to the template of its family, or the generic one."""
    return lambda model: families.get(family_of(model), generic)
