"""Masks let through only the tokens that follow a grammar."""

import json

import numpy as np
import pytest
from llguidance import LLMatcher

from common.checkpoint import open_checkpoint
from common.vocabulary import open_vocabulary
from services.llm.guided_decoding import GuidedDecoding
from tests.golden import GoldenCase
from tests.system.running import ROOT

# The embedded model has a token for each byte; the id is the byte.
VOCABULARY = open_vocabulary(open_checkpoint(ROOT / "models" / "tiny-ocr"))
END = 258
A = ("a", 0)
B = ("b", 0)


def guides() -> GuidedDecoding:
    return GuidedDecoding(lambda: VOCABULARY, 288, (END,))


def add(found: GuidedDecoding, key: tuple[str, int], grammar: str) -> None:
    """Have a request follow a grammar, and wait until that is compiled."""
    found.add(key, grammar)
    while key not in found._matchers:
        assert not any(problem for _, problem in found.take_compiled())


def allowed(found: GuidedDecoding, key: tuple[str, int]) -> set[int]:
    return set(np.flatnonzero(found.begin_masks([key])[0].result()).tolist())


def test_only_tokens_that_follow_the_grammar_may_be_drawn() -> None:
    found = guides()
    add(found, A, LLMatcher.grammar_from_regex("(ab|ac)"))
    assert allowed(found, A) == {ord("a")}
    assert found.accept(A, ord("a"))
    assert allowed(found, A) == {ord("b"), ord("c")}
    assert not found.accept(A, ord("b")), "nothing can follow: the answer is complete"


def test_an_answer_that_leaves_its_grammar_is_not_complete() -> None:
    found = guides()
    add(found, A, LLMatcher.grammar_from_regex("(ab|ac)"))
    assert found.accept(A, ord("a"))
    assert found.failure_of(A) == ""
    found.accept(A, ord("x"))
    assert "cannot follow the grammar" in found.failure_of(A)
    assert found.failure_of(B) == ""


def test_requests_without_a_grammar_have_no_mask() -> None:
    found = guides()
    add(found, A, LLMatcher.grammar_from_regex("x"))
    masks = found.begin_masks([B, A])
    assert list(masks) == [1]
    assert found.accept(B, 7)


def test_a_request_that_ended_is_forgotten() -> None:
    found = guides()
    add(found, A, LLMatcher.grammar_from_regex("x"))
    found.remove(A)
    found.remove(A)
    assert found.begin_masks([A]) == {}


def test_each_request_has_its_own_place_in_its_grammar() -> None:
    found = guides()
    for key in (A, B):
        add(found, key, LLMatcher.grammar_from_regex("[0-9]x"))
    found.accept(A, ord("1"))
    masks = found.begin_masks([A, B])
    assert masks[0].result()[ord("x")] and not masks[0].result()[ord("1")]
    assert masks[1].result()[ord("1")] and not masks[1].result()[ord("x")]


def test_a_copy_goes_on_by_itself() -> None:
    found = guides()
    add(found, A, LLMatcher.grammar_from_regex("(ab|ba)"))
    found.copy(A, B)
    found.copy(("none", 0), ("also none", 0))
    found.accept(A, ord("a"))
    found.accept(B, ord("b"))
    assert (allowed(found, A), allowed(found, B)) == ({ord("b")}, {ord("a")})
    assert found.begin_masks([("also none", 0)]) == {}


def test_a_small_grammar_is_compiled_before_a_large_one_that_waits() -> None:
    found = guides()
    sizes = {("first", 0): 3, ("large", 0): 900, ("small", 0): 1}
    for key, size in sizes.items():
        found.add(key, LLMatcher.grammar_from_regex("x" * size))
    order: list[str] = []
    while found.is_compiling:
        order += [key[0] for key, problem in found.take_compiled() if not problem]
    assert order == ["first", "small", "large"]


def test_a_request_that_ends_while_its_grammar_is_compiled_is_forgotten() -> None:
    found = guides()
    found.add(A, LLMatcher.grammar_from_regex("x" * 900))
    found.add(B, LLMatcher.grammar_from_regex("x"))
    found.remove(A)
    taken: list[tuple[tuple[str, int], str]] = []
    while found.is_compiling:
        taken += found.take_compiled()
    assert taken == [(B, "")] and A not in found._matchers


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (GoldenCase("a_image"), "<|im_end|>"),
        (GoldenCase("c_box_two_images", "qwen_vl"), "<ref>"),
        (GoldenCase("a_image", "wemm"), "</s>"),
        (GoldenCase("a_image", "wemm"), "<|im_start|>"),
    ],
    ids=str,
)
def test_the_name_of_a_special_token_in_a_grammar_is_text(case: GoldenCase, name: str) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    vocabulary = open_vocabulary(checkpoint)
    end_id = vocabulary.id_of("<|im_end|>")
    assert end_id is not None
    found = GuidedDecoding(lambda: vocabulary, checkpoint.sizes.vocab_size, (end_id,))
    schema = json.dumps({"enum": [f"a{name}b"]})
    add(found, A, LLMatcher.grammar_from_json_schema(schema))
    ids: list[int] = []
    goes_on = True
    while goes_on:
        ids.append(min(allowed(found, A)))
        goes_on = found.accept(A, ids[-1])
    if ids[-1] == end_id:
        ids.pop()
    assert b"".join(map(vocabulary.token_bytes, ids)) == f'"a{name}b"'.encode()
    assert not vocabulary.special_ids.intersection(ids)
