"""Loops end an answer, at the same token whatever happened before it, and no page ends it."""

from collections.abc import Sequence
from itertools import count, cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.families.qwen2_5_vl import PAGE_LOOPS
from common.messages import Repetition
from common.wire import Tensor
from services.llm.repetition import LoopGuard
from services.llm.request import objection_to
from tests.foreign import foreign
from tests.golden import GoldenCase
from tests.llm.builders import create_prompt
from tests.llm.test_engine import answer, create_engine, outputs_of
from tests.llm.test_token_rules import rules

QWEN = Tokenizer.from_file(str(GoldenCase("a_image").checkpoint / "tokenizer.json"))
SPLITTER = QWEN.pre_tokenizer
"""Splits a text as all vocabularies of the family do. The published ones have a token for nearly
every such piece of a table; the golden one is too small for that."""


def pieces_of(text: str) -> list[int]:
    """Return a number for each piece of a text, equal for equal pieces."""
    names: dict[str, int] = {}
    return [names.setdefault(piece, len(names)) for piece, _ in SPLITTER.pre_tokenize_str(text)]


def end_of(token_ids: Sequence[int], repetition: Repetition = PAGE_LOOPS) -> int | None:
    """Return after how many tokens a loop ends the answer; None if none does."""
    guard = LoopGuard(repetition)
    return next((n for n, token_id in enumerate(token_ids, 1) if guard.add(token_id)), None)


def is_looping(token_ids: list[int], repetition: Repetition) -> bool:
    """Whether the last tokens are a pattern several times in a row, by its definition."""
    for size in range(max(1, repetition.min_pattern_size), repetition.max_pattern_size + 1):
        tail = token_ids[-size * repetition.min_count :]
        pattern = token_ids[-size:]
        if len(tail) == size * repetition.min_count and tail == pattern * repetition.min_count:
            return True
    return False


few_tokens = st.lists(st.integers(0, 2), max_size=60)
loops = st.builds(
    Repetition,
    max_pattern_size=st.integers(3, 7),
    min_pattern_size=st.integers(0, 3),
    min_count=st.integers(2, 4),
)


@settings(max_examples=300)
@given(few_tokens, loops)
def test_a_loop_is_found_at_the_token_that_completes_it(
    token_ids: list[int], repetition: Repetition
) -> None:
    guard = LoopGuard(repetition)
    for n, token_id in enumerate(token_ids, 1):
        assert guard.add(token_id) == is_looping(token_ids[:n], repetition)


@settings(max_examples=100)
@given(few_tokens, loops, st.integers(0, 60))
def test_an_answer_that_goes_on_elsewhere_ends_at_the_same_token(
    token_ids: list[int], repetition: Repetition, cut: int
) -> None:
    whole = LoopGuard(repetition)
    found = [whole.add(token_id) for token_id in token_ids]
    resumed = LoopGuard(repetition, token_ids[:cut])
    assert [resumed.add(token_id) for token_id in token_ids[cut:]] == found[cut:]


def test_the_end_is_found_also_after_many_other_tokens() -> None:
    repetition = Repetition(max_pattern_size=5, min_count=3)
    before = list(range(1000, 1333))
    assert end_of([*before, 1, 2, 1, 2, 1, 2, 1], repetition) == len(before) + 6


@pytest.mark.parametrize(("size", "end"), [(1, 2048), (16, 2048), (20, 2240), (100, 3200)])
def test_a_line_that_goes_on_for_ever_ends_after_the_stated_number_of_tokens(
    size: int, end: int
) -> None:
    line = cycle(range(size))
    guard = LoopGuard(PAGE_LOOPS)
    assert next(n for n in count(1) if guard.add(next(line))) == end


PAGES = {
    "a form of 40 blank rows in HTML": "<tr>" + "<td></td>" * 8 + "</tr>\n",
    "a form of 40 blank rows in Markdown": "|   " * 12 + "|\n",
    "zeros": "| 0.00 " * 5 + "|\n",
    "zeros in HTML": "<tr>" + "<td>0.00</td>" * 4 + "</tr>\n",
    "rules under a wide head": "| --- " * 30 + "|\n",
    "ditto marks": '| " ' * 8 + "|\n",
    "dot leaders": "Notes " + "." * 90 + " 1\n",
    "dots with spaces": ". " * 40 + "\n",
    "lines to write on": "_" * 100 + "\n",
    "spaces of HTML": "&nbsp;" * 20 + "<br>\n",
    "spaces": " " * 100 + "\n",
    "empty LaTeX rows": " & " * 10 + "\\\\\n",
    "boxes to tick": "- [ ] \n",
}


@pytest.mark.parametrize("name", PAGES)
def test_no_page_of_equal_rows_is_taken_for_a_loop(name: str) -> None:
    assert end_of(pieces_of("A title\n" + 40 * PAGES[name] + "The end\n")) is None


def test_no_page_that_others_transcribed_is_taken_for_a_loop() -> None:
    pages = sorted(foreign("olmocr-bench-sample/olmocr_pipeline").glob("*.md"))
    texts = [page.read_text() for page in [*pages, foreign("ocrmypdf/linn.txt")]]
    assert len(texts) > 10 and max(map(len, texts)) > 4000
    for text in texts:
        # By pieces, by the tokens of a small vocabulary, and by bytes.
        for token_ids in (pieces_of(text), QWEN.encode(text).ids, text.encode()):
            assert end_of(token_ids) is None


LOOP_OF_THREE = Repetition(max_pattern_size=2, min_count=3)


@pytest.mark.parametrize(
    ("stopping", "expected"),
    [
        ({"repetition": LOOP_OF_THREE}, ([5] * 3, "repetition")),
        ({"repetition": LOOP_OF_THREE, "min_tokens": 5}, ([5] * 5, "repetition")),
        ({"repetition": LOOP_OF_THREE, "max_tokens": 3}, ([5] * 3, "length")),
        ({"repetition": Repetition(), "max_tokens": 6}, ([5] * 6, "length")),
        ({"max_tokens": 6}, ([5] * 6, "length")),
    ],
)
def test_a_loop_ends_its_request(
    stopping: dict[str, object], expected: tuple[list[int], str]
) -> None:
    engine = create_engine()
    prompt = create_prompt(**{"max_tokens": 9} | stopping)
    prompt.token_rules = rules({5: 100.0})
    engine.add(prompt)
    assert answer(outputs_of(engine)) == expected
    assert not engine.requests


def test_tokens_of_earlier_attempts_count() -> None:
    engine = create_engine()
    prompt = create_prompt(max_tokens=9, repetition=LOOP_OF_THREE)
    prompt.token_rules = rules({5: 100.0})
    prompt.output_token_ids = Tensor.of_int64([7, 5, 5])
    engine.add(prompt)
    [output] = outputs_of(engine)
    assert (output.offset, output.token_ids, output.finish_reason) == (3, [5], "repetition")


def test_values_that_do_not_fit_together_are_refused_of_a_preprocess_too() -> None:
    limits = create_engine().limits
    bad = create_prompt(repetition=Repetition(max_pattern_size=2, min_count=1))
    assert "min_count" in objection_to(bad, limits)
