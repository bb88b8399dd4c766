"""Asks a running system every question, and compares each answer with the reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.checkpoint import Checkpoint
from common.vocabulary import open_vocabulary
from services.commands.verification.comparison import (
    Served,
    compare,
    compare_vectors,
    first_difference,
)
from services.commands.verification.questions import (
    Question,
    chat_questions,
    label_questions,
    vector_questions,
)
from services.commands.verification.reference import (
    ChatReference,
    PixelLimits,
    PoolingReference,
    PromptMismatch,
)
from services.commands.verification.report import Finding, describe, shown
from services.commands.verification.served import NUM_TOP, System


@dataclass(frozen=True)
class Plan:
    """What to compare, and how strictly."""

    checkpoint: Checkpoint
    system: System
    images: Sequence[bytes]
    """The user's images as files; none for the built-in ones."""
    limits: PixelLimits
    max_tokens: int
    dtype: str
    """What the system computes in."""
    tolerance: float
    """How far a log-probability may lie from the reference's, or how long the difference of two
    vectors of length 1 may be."""


def findings(plan: Plan, reference: ChatReference | PoolingReference) -> Iterator[Finding]:
    """Yield what is found for each question. Raises ClientError if one is not answered."""
    if isinstance(reference, ChatReference):
        return ChatVerifier(plan, reference).findings()
    if "classify" in plan.checkpoint.family.tasks_of(plan.checkpoint):
        return label_findings(plan, reference)
    return vector_findings(plan, reference)


class ChatVerifier:
    """Compares the answers of a model that writes."""

    def __init__(self, plan: Plan, reference: ChatReference) -> None:
        self._plan = plan
        self._reference = reference
        self._vocabulary = open_vocabulary(plan.checkpoint)
        self._answer_ids = range(plan.checkpoint.sizes.vocab_size)
        placeholders = plan.checkpoint.family.placeholder_ids(plan.checkpoint).values()
        self._prompt_ids = {*self._answer_ids, *placeholders}

    def findings(self) -> Iterator[Finding]:
        for question in chat_questions(self._plan.images, self._reference.max_images):
            served = self._plan.system.answer(question, self._plan.max_tokens, self._vocabulary)
            yield self._finding(question, served)

    def _finding(self, question: Question, served: Served) -> Finding:
        is_known = self._prompt_ids.issuperset(served.prompt_ids or ())
        if not is_known or any(token not in self._answer_ids for token in served.token_ids):
            note = "the system serves token ids that this model does not have"
            return Finding(question.name, "differs", None, f"{note}: it is another model")
        expected = self._reference.prompt_ids(question)
        prompt, note = self._compare_prompts(served.prompt_ids, expected)
        try:
            log_probs = self._reference.log_probs(
                question, served.prompt_ids or expected, served.token_ids
            )
        except PromptMismatch as e:
            return Finding(question.name, prompt, None, f"{note}; {e}")
        comparison = compare(served, log_probs, self._plan.tolerance)
        step = describe(comparison.first, self._name) if comparison.first else ""
        return Finding(question.name, prompt, comparison, "; ".join(filter(None, (note, step))))

    def _compare_prompts(
        self, served: Sequence[int] | None, expected: Sequence[int]
    ) -> tuple[str, str]:
        """Return how the prompts compare in a word, and what is to be said about it."""
        if served is None:
            return "unknown", "the system does not tell its prompt, so that of the reference counts"
        place = first_difference(served, expected)
        if place is None:
            return "equal", ""
        names = [
            shown(ids[place], self._name) if place < len(ids) else "its end"
            for ids in (served, expected)
        ]
        return "differs", (
            f"the prompt has {len(served)} tokens, the reference's {len(expected)}; at {place} it "
            f"has {names[0]}, the reference's {names[1]}"
        )

    def _name(self, token: int) -> str:
        return self._vocabulary.token_bytes(token).decode(errors="replace")


def label_findings(plan: Plan, reference: PoolingReference) -> Iterator[Finding]:
    """Compare the labels of a model that classifies, as answers of one token."""
    labels = plan.checkpoint.family.labels(plan.checkpoint)
    for question in label_questions(plan.images):
        expected = reference.pool(question)
        with np.errstate(divide="ignore"):
            found = np.log(plan.system.label_probabilities(question))
        if found.shape != expected.shape:
            note = f"the system has {len(found)} labels, the model {len(expected)}"
            yield Finding(question.name, "", None, f"{note}: it is another model")
            continue
        best = found.argsort()[::-1][:NUM_TOP].tolist()
        top = {label: float(found[label]) for label in best}
        comparison = compare(
            Served(None, best[:1], [top[best[0]]], [top]), expected[None], plan.tolerance
        )
        step = describe(comparison.first, labels.__getitem__) if comparison.first else ""
        yield Finding(question.name, "", comparison, step)


def vector_findings(plan: Plan, reference: PoolingReference) -> Iterator[Finding]:
    """Compare the vectors of a model that embeds."""
    for question in vector_questions(plan.images):
        expected = reference.pool(question)
        found = plan.system.embedding(question)
        if found.shape != expected.shape:
            note = f"the system's vectors have {len(found)} numbers, the model's {len(expected)}"
            yield Finding(question.name, "", None, f"{note}: it is another model")
            continue
        comparison = compare_vectors(found, expected, plan.tolerance)
        yield Finding(question.name, "", comparison, "")
