"""Compares what a system served with what the reference computes for the same tokens.

The reference is never asked to continue by itself: it computes the log-probabilities of each step
given the tokens that were served before it. One token that differs thus does not make all that
follow differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

BOUNDS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5, "int8": 1.0}
"""How far a log-probability may lie from the reference's, by what the system computes in.

docs/verify.md says what was measured."""


VECTOR_BOUNDS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 0.03, "int8": 0.1}
"""The same for the length of the difference of two vectors of length 1."""


@dataclass(frozen=True)
class Served:
    """What a system answered to a question."""

    prompt_ids: list[int] | None
    """The prompt as the model read it; None if the system does not say."""
    token_ids: list[int]
    log_probs: list[float] = field(default_factory=list)
    """That of each token; empty if the system does not say."""
    top: list[Mapping[int, float]] = field(default_factory=list)
    """The log-probabilities of the most likely tokens of each step, by their ids."""


@dataclass(frozen=True)
class Step:
    """A step of an answer at which system and reference differ."""

    kind: Literal["token", "number", "tie"]
    """Whether the system took a token that is clearly not the best, or a number lies outside the
    bound, or only a tie was decided otherwise."""
    index: int
    served: int
    """The token that the system took."""
    best: int
    """The reference's most likely token."""
    margin: float
    """By how much the reference finds `best` more likely than `served`, in log-probability."""
    difference: float
    """The greatest difference of a log-probability at this step; NaN if none was served."""


@dataclass(frozen=True)
class Comparison:
    """How an answer compares with the reference."""

    num_tokens: int
    max_difference: float
    """The greatest difference of a log-probability, of the served tokens and of the most likely
    ones; NaN if the system served none."""
    mean_difference: float
    """Over the served tokens."""
    agreement: float
    """The share of steps at which the served token is the reference's most likely one."""
    num_ties: int
    """The steps at which it is not, but only rounding decided between the two."""
    first: Step | None
    """The first step outside the bounds; else the first tie; None if there is neither."""

    @property
    def is_within(self) -> bool:
        return self.first is None or self.first.kind == "tie"


def compare(served: Served, log_probs: np.ndarray, tolerance: float) -> Comparison:
    """Compare an answer of at least one token.

    Parameters
    ----------
    log_probs
        float32 [num_tokens, vocab_size]: the reference's, after the same tokens.
    tolerance
        how far a log-probability may lie from the reference's. Two tokens that the reference holds
        apart by at most twice of it are a tie: each may have moved by the tolerance.
    """
    token_ids = served.token_ids
    assert token_ids and log_probs.shape[0] == len(token_ids)
    best = log_probs.argmax(-1)
    margins = [
        float(row[first] - row[token])
        for row, first, token in zip(log_probs, best, token_ids, strict=True)
    ]
    own = own_differences(served, log_probs)
    worst = worst_differences(served, own, log_probs)
    steps = [
        Step(kind, n, token_ids[n], int(best[n]), margins[n], worst[n])
        for n in range(len(token_ids))
        if (kind := kind_of(margins[n], worst[n], int(best[n]) != token_ids[n], tolerance))
    ]
    ties = [step for step in steps if step.kind == "tie"]
    outside = [step for step in steps if step.kind != "tie"]
    return Comparison(
        num_tokens=len(token_ids),
        max_difference=max(worst),
        mean_difference=float(np.mean(own)) if own else math.nan,
        agreement=float(np.mean(best == np.array(token_ids))),
        num_ties=len(ties),
        first=next(iter((*outside, *ties)), None),
    )


def compare_vectors(served: np.ndarray, expected: np.ndarray, tolerance: float) -> Comparison:
    """Compare two vectors of length 1 by the length of their difference.

    Their agreement is their cosine.
    """
    difference = distance(float(np.linalg.norm(served - expected)), 0.0)
    within = difference <= tolerance
    return Comparison(
        num_tokens=1,
        max_difference=difference,
        mean_difference=difference,
        agreement=float(served @ expected),
        num_ties=0,
        first=None if within else Step("number", 0, 0, 0, 0.0, difference),
    )


def kind_of(
    margin: float, difference: float, is_other: bool, tolerance: float
) -> Literal["token", "number", "tie", ""]:
    """Return how a step differs; empty if it does not."""
    if is_other and not margin <= 2 * tolerance:
        return "token"
    if difference > tolerance:
        return "number"
    return "tie" if is_other else ""


def own_differences(served: Served, log_probs: np.ndarray) -> list[float]:
    """Return how far each served token's log-probability lies from the reference's."""
    if not served.log_probs:
        return []
    return [
        distance(value, row[token])
        for value, row, token in zip(served.log_probs, log_probs, served.token_ids, strict=True)
    ]


def worst_differences(served: Served, own: Sequence[float], log_probs: np.ndarray) -> list[float]:
    """Return the greatest difference at each step, the most likely tokens included."""
    worst = list(own) or [math.nan] * len(served.token_ids)
    for n, (top, row) in enumerate(zip(served.top, log_probs, strict=False)):
        for token, value in top.items():
            difference = distance(value, row[token]) if token < len(row) else math.inf
            worst[n] = difference if math.isnan(worst[n]) else max(worst[n], difference)
    return worst


def distance(a: float, b: float) -> float:
    """Return the distance of two log-probabilities; infinite if one is not a number."""
    found = abs(float(a) - float(b))
    return math.inf if math.isnan(found) else found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the first index at which two lists of ids differ; None if they are equal."""
    if list(a) == list(b):
        return None
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
