"""How MMMU's own script reads an answer (github.com/MMMU-Benchmark/MMMU, eval_utils.py).

Where that script guesses an option at random, no option is chosen here, so scores repeat.
"""

import re
from collections.abc import Iterator, Sequence

from services.commands.evaluation.choices import Options

ENDS = ",.!?;:'"
MOST_WORDS_WITHOUT_TEXT = 5
"""Only an answer of more words is searched for the texts of the options."""
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What an open answer's essence follows; in its last line also an equals sign."""
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""Numbers with thousands separators, in scientific notation, and plain ones."""
DIGITS = 2
"""Numbers are rounded to this number of digits after the point."""


def official_option(answer: str, options: Options) -> str:
    """Return the letter of the option that an answer names last; "" if it names none."""
    for end in ENDS:
        answer = answer.strip(end)
    answer = f" {answer} "
    for form in ("({})", " {} "):
        places = {letter: answer.rfind(form.format(letter)) for letter in options}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(answer.split()) <= MOST_WORDS_WITHOUT_TEXT:
        return ""
    lower = answer.lower()
    places = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
    return max(places, key=places.__getitem__) if max(places.values()) >= 0 else ""


def is_open_answer_right(answer: str, right: Sequence[str]) -> bool:
    """Whether an open answer contains a right text, or has a right number."""
    accepted = [form for each in right for form in forms_of(each)]
    for essence in essences(answer):
        if isinstance(essence, float):
            if essence in accepted:
                return True
        elif any(isinstance(each, str) and each in essence for each in accepted):
            return True
    return False


def essences(answer: str) -> Iterator[str | float]:
    """Yield the parts of an open answer that may be the result, and the numbers in them."""
    for part in key_parts(answer):
        yield from forms_of(part)
        for pattern in NUMBERS:
            for number in pattern.findall(part):
                yield from forms_of(number)


def key_parts(answer: str) -> list[str]:
    """Return the shortest text after an indicator in each line; without any, the whole answer."""
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    parts = []
    for number, line in enumerate(lines, 1):
        indicators = (*INDICATORS, "=") if number == len(lines) else INDICATORS
        ends = [line.split(word)[-1].strip() for word in indicators if word in line]
        # The script takes an empty text for none, so the next one replaces it.
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in TRIVIAL:
            parts.append(shortest)
    return parts or [answer]


def forms_of(text: str) -> list[str | float]:
    """Return what a text is compared as: a rounded number, or itself in lower case.

    A single character is compared with a space before or after it.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), DIGITS)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
