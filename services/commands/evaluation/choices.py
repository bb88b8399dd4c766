"""Questions with options: their prompt, and which option an answer chooses.

The prompt and the exact matching are those of VLMEvalKit (vlmeval/dataset/image_mcq.py and
vlmeval/utils/matching_util.py), with which results on MMBench and MMMU are published.
"""

import re
import string
from collections.abc import Mapping

from services.commands.evaluation.task import fill

Options = Mapping[str, str]
"""The texts of the options by their letters."""
CHOICE = "{hint}Question: {question}\n{options}"
INSTRUCTION = "Please select the correct answer from the options above. \n"
PUNCTUATION = ".()[],:;!*#{}"
NO_OPTION = "Z"
"""What an answer chooses that says it cannot choose."""
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
LAST_WORDS = 4
"""A letter counts only among this number of last words; before them it may be an article."""
SENTENCE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def options_of(cells: Mapping[str, str]) -> dict[str, str]:
    """Return the options of a row, which are in columns named by capital letters."""
    return {letter: cells[letter] for letter in string.ascii_uppercase if letter in cells}


def ask_for_option(template: str, question: str, options: Options, hint: str = "") -> str:
    """Return a question with its options; without any, it is an open question."""
    listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return fill(
        template,
        hint=f"Hint: {hint}\n" if hint else "",
        question=question,
        options=f"Options:\n{listed}{INSTRUCTION}" if options else "",
    )


def chosen_option(answer: str, options: Options) -> str:
    """Return the letter of the option that an answer chooses; "" if that is not clear.

    It is the only letter among the answer's words, if that is near the end; or the letter in a
    sentence like "the answer is B"; or the only option whose text the answer contains, unless the
    answer is long.
    """
    return chosen_letter(answer, options) or chosen_text(answer, options)


def chosen_letter(answer: str, options: Options) -> str:
    if any(refusal in answer for refusal in REFUSALS):
        return NO_OPTION
    words = answer.translate(str.maketrans(PUNCTUATION, " " * len(PUNCTUATION))).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - LAST_WORDS:
        return letters[0]
    if not letters and NO_OPTION in words:
        return NO_OPTION
    found = SENTENCE.search(answer)
    letter = found[1].upper() if found else ""
    return letter if letter in options else ""


def chosen_text(answer: str, options: Options) -> str:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return ""
    contained = [letter for letter, text in options.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else ""
