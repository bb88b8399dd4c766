"""The comparison of visual answers, against cases worked by hand from the official script."""

import pytest

from services.commands.evaluation.vqa_text import (
    COMPLETED,
    leave_one_out,
    official_score,
    plain_words,
    without_punctuation,
)


def people(*answers: str) -> list[dict[str, object]]:
    return [{"answer": answer, "answer_id": id} for id, answer in enumerate(answers, 1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("coca-cola", "coca cola"),
        ("coca - cola", "coca  cola"),
        ("a-b -c", "ab c"),  # next to a space once is enough for all of them
        ("1,000-2", "10002"),  # a comma between digits removes every mark
        ("yes, no", "yes no"),
        ("a,b", "a b"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("5.a", "5a"),  # the look-behind that should keep this period has no effect
        ("end.", "end"),
        ("." * 40, "." * 8),  # at most 32 periods are removed
        ("don't", "don't"),
    ],
)
def test_punctuation(text: str, expected: str) -> None:
    assert without_punctuation(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat", "cat"),
        ("a an the", ""),
        ("None zero TEN", "0 0 10"),
        ("dont", "don't"),
        ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # its entry has a capital
    ],
)
def test_words(text: str, expected: str) -> None:
    assert plain_words(text) == expected


def test_the_table_of_contractions_is_whole() -> None:
    """The official table has 120 entries: four have capitals and two change nothing."""
    assert len(COMPLETED) == 114
    assert (COMPLETED["youd've"], COMPLETED["you'dve"]) == ("you'd've", "you'd've")


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (8 * (2 / 3) + 2 * (1 / 3)) / 10),
        (3, (7 * 1 + 3 * (2 / 3)) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_each_person_is_left_out_once(same: int, expected: float) -> None:
    answers = people(*["cat"] * same, *["dog"] * (10 - same))
    assert leave_one_out("cat", answers) == pytest.approx(expected)


def test_others_are_annotations_that_differ_so_equal_ones_leave_each_other_out() -> None:
    assert leave_one_out("cat", [{"answer": "cat"}] * 10) == 0


def test_both_sides_are_processed_only_if_people_disagree() -> None:
    mixed = people(*["The Cat."] * 9, "dog")
    assert official_score(" cat\n", mixed) == 1
    assert official_score("The Cat.", mixed) == 1
    assert official_score("cat", people(*["The Cat."] * 10)) == 0
    assert official_score(" The Cat.\n", people(*["The Cat."] * 10)) == 1


def test_white_space_of_the_people_is_removed_before_they_are_compared() -> None:
    assert official_score("Cat", people(*["Cat", " Cat\t"] * 5)) == 1
