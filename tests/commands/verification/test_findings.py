"""What is found of a system that answers as told, next to a reference that computes as told."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common.checkpoint import open_checkpoint
from services.commands.verification.comparison import Served
from services.commands.verification.findings import Plan, findings
from services.commands.verification.questions import Question
from services.commands.verification.reference import (
    ChatReference,
    PixelLimits,
    PoolingReference,
    PromptMismatch,
)
from services.commands.verification.report import Finding
from tests.golden import GoldenCase

CHAT = GoldenCase("a_image").checkpoint
LABELS = GoldenCase("vqa_base", "vlmo").checkpoint
VECTORS = GoldenCase("retrieval_base", "vlmo").checkpoint
VOCAB_SIZE = 544
NUM_LABELS = 31
PLACEHOLDER = 524
PROMPT = [1, 2, 3]
BEST = 7


class Told(ChatReference):
    """Finds token 7 the most likely at each step, whatever came before."""

    title = "as told"
    max_images = 1

    def prompt_ids(self, question: Question) -> list[int]:
        return PROMPT

    def log_probs(
        self, question: Question, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> np.ndarray:
        if PLACEHOLDER in prompt_ids:
            raise PromptMismatch("the prompt has 1 placeholders")
        found = np.full((len(answer_ids), VOCAB_SIZE), -9.0, np.float32)
        found[:, BEST] = -0.5
        return found


class ToldPooling(PoolingReference):
    title = "as told"

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def pool(self, question: Question) -> np.ndarray:
        return self._values


class ToldSystem:
    name = "told"

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def answer(self, *_: Any) -> Served:
        return self._answer

    def label_probabilities(self, question: Question) -> np.ndarray:
        return self._answer

    embedding = label_probabilities


def found_for(model: Any, answer: Any, reference: ChatReference | PoolingReference) -> Finding:
    """Return the first finding."""
    plan = Plan(
        checkpoint=open_checkpoint(model),
        system=ToldSystem(answer),  # type: ignore[arg-type]
        images=(),
        limits=PixelLimits(),
        max_tokens=2,
        dtype="float32",
        tolerance=1e-3,
    )
    return next(iter(findings(plan, reference)))


def test_an_equal_answer_has_nothing_to_say() -> None:
    found = found_for(CHAT, Served(PROMPT, [BEST, BEST], [-0.5, -0.5]), Told())
    assert (found.question, found.prompt, found.is_within, found.note) == (
        "text",
        "equal",
        True,
        "",
    )


def test_a_prompt_that_is_not_told_is_that_of_the_reference() -> None:
    found = found_for(CHAT, Served(None, [BEST]), Told())
    assert (found.prompt, found.is_within) == ("unknown", True)
    assert "does not tell its prompt" in found.note


@pytest.mark.parametrize(
    ("prompt_ids", "said"),
    [
        ([1, 4, 3], "has 3 tokens, the reference's 3; at 1 it has 4 ("),
        ([1, 2], "has 2 tokens, the reference's 3; at 2 it has its end, the reference's 3 ("),
    ],
)
def test_another_prompt_differs_even_if_the_numbers_agree(prompt_ids: list[int], said: str) -> None:
    found = found_for(CHAT, Served(prompt_ids, [BEST], [-0.5]), Told())
    assert found.prompt == "differs" and not found.is_within
    assert found.comparison and found.comparison.is_within
    assert said in found.note


def test_images_without_their_place_in_the_prompt_leave_nothing_to_compare() -> None:
    found = found_for(CHAT, Served([1, PLACEHOLDER], [BEST], [-0.5]), Told())
    assert (found.prompt, found.comparison, found.is_within) == ("differs", None, False)
    assert "the prompt has 1 placeholders" in found.note


@pytest.mark.parametrize(
    ("prompt_ids", "answer_ids"), [([VOCAB_SIZE], [BEST]), (PROMPT, [VOCAB_SIZE])]
)
def test_ids_beyond_the_vocabulary_are_another_model(
    prompt_ids: list[int], answer_ids: list[int]
) -> None:
    found = found_for(CHAT, Served(prompt_ids, answer_ids), Told())
    assert (found.comparison, found.is_within) == (None, False)
    assert "another model" in found.note


def test_a_label_is_compared_as_a_token_is() -> None:
    probabilities = np.full(NUM_LABELS, 0.01, np.float32)
    probabilities[3] = 0.7
    expected = np.log(probabilities)
    assert found_for(LABELS, probabilities, ToldPooling(expected)).is_within
    found = found_for(LABELS, np.roll(probabilities, 1), ToldPooling(expected))
    assert found.note.startswith("step 0: another token; served 4 ('")


def test_vectors_are_compared_by_their_distance() -> None:
    vector = np.zeros(64, np.float32)
    vector[0] = 1
    assert found_for(VECTORS, vector, ToldPooling(vector)).is_within
    assert not found_for(VECTORS, -vector, ToldPooling(vector)).is_within


@pytest.mark.parametrize("model", [LABELS, VECTORS])
def test_another_number_of_labels_or_numbers_is_another_model(model: Any) -> None:
    found = found_for(model, np.ones(5, np.float32), ToldPooling(np.zeros(6, np.float32)))
    assert (found.comparison, found.is_within) == (None, False)
    assert "another model" in found.note
