"""Error rates against cases counted by hand."""

import pytest

from services.commands.evaluation.cer import normalise, score
from services.commands.evaluation.task import Answered, Item
from tests.commands.evaluation.endpoint import parse

FLAGS = ("cer", "--data", "x")


def answered(output: str, text: str, failed: bool = False) -> Answered:
    return Answered(Item("i", ("",), text), output, failed)


def test_the_edits_of_all_items_are_divided_by_all_characters_and_words() -> None:
    """`hallo wrld`: one substitution, one insertion, of 11; both words wrong. `b c`: `c` is 2 edits
    too many, of 1 character; one word too many, of 1."""
    scores = score([answered("hallo wrld", "hello world"), answered("b c", "b")], parse(*FLAGS))
    assert scores.parts == [
        {"character_edits": 2, "characters": 11, "word_edits": 2, "words": 2},
        {"character_edits": 2, "characters": 1, "word_edits": 1, "words": 1},
    ]
    assert [row.value for row in scores.rows] == [4 / 12, 3 / 3, 0]


def test_a_failed_item_misses_every_character() -> None:
    scores = score([answered("", "abc", failed=True), answered("abc", "abc")], parse(*FLAGS))
    assert [row.value for row in scores.rows] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "A, b\u00e9 c"),
        (("--ignore-case",), "a, b\u00e9 c"),
        (("--ignore-punctuation",), "A b\u00e9 c"),
        (("--exact-whitespace",), " A,\n b\u00e9  c\n"),
    ],
)
def test_the_rules_of_comparison_are_stated(flags: tuple[str, ...], expected: str) -> None:
    arguments = parse(*FLAGS, *flags)
    assert normalise(" A,\n be\u0301  c\n", arguments) == expected
    note = score([answered("a", "a")], arguments).notes[0]
    words = {"--ignore-case": "case", "--ignore-punctuation": "removed"}
    for flag, word in words.items():
        assert (word in note) == (flag in flags)
    assert ("as it is" in note) == ("--exact-whitespace" in flags)
