"""Compares the answers of now with the recorded ones, and their times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.recording import Answered
from services.commands.replay.bodies import ABORTED
from services.commands.replay.outcome import Outcome, Replayed, floats

SAME_VALUES = 1e-3
"""Probabilities and embeddings are equal up to this difference: their sums depend on the batch."""
PERCENTILES = (50, 90, 99)

Verdict = Literal[
    "equal", "differs", "failed", "failed_again", "answered_now", "not_comparable", "skipped"
]
"""What the comparison says of a request:

- equal: the same answer; of an aborted one, as far as it was recorded.
- differs: another answer.
- failed: it was answered before, and fails now.
- failed_again: it failed before, too.
- answered_now: it failed before.
- not_comparable: answered now, but the recording ends before its answer.
- skipped: it was not sent, because it needs gRPC.
"""
SUCCESSES = ("stop", "length", "repetition", "tool_calls", "pooled", ABORTED)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the comparison of one request says."""

    verdict: Verdict
    detail: str = ""
    """Why it failed or differs, in words."""
    first_difference: int | None = None
    """The index of the first token, character or value that differs."""


def compare(replayed: Replayed) -> Comparison:
    """Return what became of a request in comparison with its recording."""
    outcome = replayed.outcome
    answered = replayed.exchange.answered
    if outcome is None:
        return Comparison("skipped", "it needs --grpc")
    if answered is not None and answered.outcome not in SUCCESSES:
        return Comparison("failed_again" if outcome.error else "answered_now", outcome.error)
    if outcome.error:
        return Comparison("failed", outcome.error)
    if answered is None:
        return Comparison("not_comparable", "the recording ends before its answer")
    if answered.outcome == "pooled":
        return compare_values(answered, outcome)
    return compare_answers(answered, outcome)


def compare_values(answered: Answered, outcome: Outcome) -> Comparison:
    before = np.array(values_of(answered), np.float32)
    now = np.array(outcome.values, np.float32)
    if before.shape != now.shape:
        return Comparison("differs", f"{len(now)} values and not {len(before)}")
    gaps = np.abs(before - now)
    if np.all(gaps <= SAME_VALUES):
        return Comparison("equal")
    worst = int(np.nanargmax(gaps)) if np.isfinite(gaps).any() else 0
    return Comparison("differs", f"value {worst} by {gaps[worst]:.3g}", worst)


def values_of(answered: Answered) -> list[float]:
    """Return the recorded probabilities or embedding."""
    return floats(answered.values)


def compare_answers(answered: Answered, outcome: Outcome) -> Comparison:
    """Compare token ids, or the texts if the server returns no ids."""
    unit = "token"
    before: Sequence[Any] = answered.token_ids
    now: Sequence[Any] = outcome.token_ids
    if not (before and now):
        unit = "character"
        before = answered.text
        now = outcome.text
    if answered.outcome == ABORTED:
        now = now[: len(before)]
    if before == now:
        return compare_ends(answered, outcome)
    pairs = zip(before, now, strict=False)
    first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(now)))
    counts = f"of {len(before)} before and {len(now)} now"
    return Comparison("differs", f"first at {unit} {first} {counts}", first)


def compare_ends(answered: Answered, outcome: Outcome) -> Comparison:
    # The call of a tool that the client named ends with "stop" over HTTP.
    now = {"stop", "tool_calls"} if outcome.finish_reason == "stop" else {outcome.finish_reason}
    if answered.outcome in {ABORTED, *now}:
        return Comparison("equal")
    return Comparison("differs", f"ends with {outcome.finish_reason}, before {answered.outcome}")


# Times


def time_percentiles(pairs: Sequence[tuple[Answered, Outcome]]) -> dict[str, dict[str, float]]:
    """Return percentiles of times in seconds, recorded and replayed, of answered requests.

    The keys are ttft, tpot and e2e with _recorded or _replayed; the inner ones p50, p90 and p99.
    A time that no request has is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for name, recorded_time, replayed_time in TIMES:
        values = [(recorded_time(before), replayed_time(now)) for before, now in pairs]
        both = [(a, b) for a, b in values if a is not None and b is not None]
        for column, when in enumerate(("recorded", "replayed")):
            if both:
                found[f"{name}_{when}"] = percentiles([pair[column] for pair in both])
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {
        f"p{percent}": round(float(np.percentile(values, percent)), 6) for percent in PERCENTILES
    }


def tpot(first: float | None, seconds: float, num_tokens: int) -> float | None:
    """Return the seconds per token after the first one."""
    if first is None or num_tokens < 2:
        return None
    return max(0.0, seconds - first) / (num_tokens - 1)


TIMES: tuple[
    tuple[str, Callable[[Answered], float | None], Callable[[Outcome], float | None]], ...
] = (
    ("ttft", lambda before: before.first_token_seconds, lambda now: now.first_token_seconds),
    (
        "tpot",
        lambda before: tpot(before.first_token_seconds, before.seconds, len(before.token_ids)),
        lambda now: tpot(now.first_token_seconds, now.seconds, now.num_tokens),
    ),
    ("e2e", lambda before: before.seconds, lambda now: now.seconds),
)
