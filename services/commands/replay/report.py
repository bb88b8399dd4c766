"""What `twinlens replay` reports: a table, a JSON object, and a file of both answers."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from common.recording import Exchange, Recording
from services.commands.client import cannot_write
from services.commands.output import json_line, one_line
from services.commands.replay.bodies import ABORTED
from services.commands.replay.compare import (
    Comparison,
    Verdict,
    compare,
    time_percentiles,
    values_of,
)
from services.commands.replay.listing import summary_of
from services.commands.replay.outcome import Replayed

SHOWN = 10
"""How many requests that got worse the table names."""
WORSE = ("differs", "failed")
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Report:
    """The comparison of a replay with its recording."""

    def __init__(
        self,
        recording: Recording,
        replayed: Sequence[Replayed],
        seconds: float,
        is_interrupted: bool = False,
    ) -> None:
        """`replayed` may have any order. Requests that an interrupt left unanswered are missing."""
        self.recording = recording
        self.replayed = sorted(replayed, key=lambda one: one.exchange.arrival)
        self.seconds = seconds
        self.is_interrupted = is_interrupted
        self.comparisons = [compare(one) for one in self.replayed]
        self.counts = Counter(comparison.verdict for comparison in self.comparisons)
        self.times = time_percentiles(
            [
                (one.exchange.answered, one.outcome)
                for one, comparison in zip(self.replayed, self.comparisons, strict=True)
                if comparison.verdict in ("equal", "differs")
                and one.exchange.answered
                and one.outcome
                and one.exchange.answered.outcome != ABORTED
            ]
        )

    def is_worse(self, allow_differences: bool) -> bool:
        """Whether a request fails that was answered before, or is answered differently."""
        differs = 0 if allow_differences else self.counts["differs"]
        return self.counts["failed"] + differs > 0

    def summary(self) -> dict[str, Any]:
        sent = [one.outcome for one in self.replayed if one.outcome]
        about = {f"recorded_{name}": value for name, value in summary_of(self.recording).items()}
        return (
            {
                "requests": len(self.replayed),
                "duration_seconds": round(self.seconds, 3),
                "is_interrupted": self.is_interrupted,
            }
            | {verdict: self.counts[verdict] for verdict in VERDICTS}
            | {"lag_max_seconds": round(max((outcome.lag for outcome in sent), default=0.0), 4)}
            | self._flat_times()
            | about
        )

    def _flat_times(self) -> dict[str, float]:
        """Return the times under keys such as ttft_p50_seconds and recorded_ttft_p50_seconds."""
        flat: dict[str, float] = {}
        for name, values in self.times.items():
            measure, when = name.split("_")
            prefix = "recorded_" if when == "recorded" else ""
            flat |= {f"{prefix}{measure}_{p}_seconds": value for p, value in values.items()}
        return flat

    def text(self) -> str:
        counts = ", ".join(
            f"{self.counts[verdict]} {verdict.replace('_', ' ')}"
            for verdict in VERDICTS
            if self.counts[verdict]
        )
        lines = [
            f"{len(self.replayed)} requests in {self.seconds:.1f} s: {counts}",
            *self._time_lines(),
            *self._worse_lines(),
        ]
        return "\n".join(lines)

    def _time_lines(self) -> list[str]:
        if not self.times:
            return []
        head = f"{'milliseconds':<16}{'p50':>10}{'p90':>10}{'p99':>10}"
        rows = [
            f"{name.replace('_', ' '):<16}"
            + "".join(f"{1000 * value:>10.1f}" for value in values.values())
            for name, values in self.times.items()
        ]
        return ["", head, *rows]

    def _worse_lines(self) -> list[str]:
        worse = [
            (one.exchange, comparison)
            for one, comparison in zip(self.replayed, self.comparisons, strict=True)
            if comparison.verdict in WORSE
        ]
        lines = [""] if worse else []
        lines += [describe(exchange, comparison) for exchange, comparison in worse[:SHOWN]]
        if len(worse) > SHOWN:
            lines.append(f"and {len(worse) - SHOWN} more; --out DIR writes them all")
        return lines


def describe(exchange: Exchange, comparison: Comparison) -> str:
    asked = exchange.asked
    return one_line(
        f"request {asked.number} ({asked.request_id}): {comparison.verdict}, {comparison.detail}"
    )


def write_requests(report: Report, folder: Path) -> None:
    """Write a JSON line for each request with both answers. Only the owner may read the file.

    Raises
    ------
    ClientError
        if it cannot be written.
    """
    path = folder / "requests.jsonl"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            for one, comparison in zip(report.replayed, report.comparisons, strict=True):
                file.write(json_line(entry(one, comparison)) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def entry(one: Replayed, comparison: Comparison) -> dict[str, Any]:
    """Return a request with its verdict and both answers."""
    asked = one.exchange.asked
    answered = one.exchange.answered
    outcome = one.outcome
    found: dict[str, Any] = {
        "number": asked.number,
        "request_id": asked.request_id,
        "task": asked.task,
        "verdict": comparison.verdict,
        "detail": comparison.detail,
        "first_difference": comparison.first_difference,
        "recorded": None,
        "replayed": None,
    }
    if answered:
        found["recorded"] = {
            "outcome": answered.outcome,
            "error": answered.error,
            "text": answered.text,
            "token_ids": answered.token_ids,
            "values": values_of(answered),
            "ttft_seconds": answered.first_token_seconds,
            "e2e_seconds": answered.seconds,
        }
    if outcome:
        found["replayed"] = {
            "outcome": outcome.finish_reason,
            "error": outcome.error,
            "text": outcome.text,
            "token_ids": outcome.token_ids,
            "values": outcome.values,
            "ttft_seconds": outcome.first_token_seconds,
            "e2e_seconds": outcome.seconds,
            "lag_seconds": outcome.lag,
        }
    return found
