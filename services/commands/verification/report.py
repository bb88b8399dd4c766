"""What `twinlens verify` prints: a table, what differs first, and a verdict."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from services.commands.verification.comparison import Comparison, Step

HEADINGS = ("question", "prompt", "tokens", "greatest", "mean", "agree", "ties", "verdict")
ROW = "{:<16} {:>8} {:>6} {:>9} {:>9} {:>7} {:>4}  {}"
KINDS = {
    "token": "another token",
    "number": "another log-probability",
    "tie": "a tie, decided otherwise",
}


@dataclass(frozen=True)
class Finding:
    """What was found for one question."""

    question: str
    prompt: str
    """`equal`, `differs`, `unknown`; empty for models without one."""
    comparison: Comparison | None
    """None if the numbers cannot be compared."""
    note: str = ""
    """What is to be said besides."""

    @property
    def is_within(self) -> bool:
        return (
            self.prompt != "differs" and self.comparison is not None and self.comparison.is_within
        )

    def row(self) -> str:
        verdict = "ok" if self.is_within else "DIFFERS"
        found = self.comparison
        if found is None:
            return ROW.format(self.question, self.prompt, "-", "-", "-", "-", "-", verdict)
        return ROW.format(
            self.question,
            self.prompt,
            found.num_tokens,
            amount(found.max_difference),
            amount(found.mean_difference),
            f"{found.agreement:.1%}",
            found.num_ties,
            verdict,
        )

    def fields(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        found = asdict(self.comparison) if self.comparison else None
        fields = {"question": self.question, "prompt": self.prompt, "is_within": self.is_within}
        return fields | {"note": self.note, "comparison": found}


def amount(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def shown(token: int, name_of: Callable[[int], str]) -> str:
    """Return a token or a label by its id and its name, fit for a terminal."""
    return f"{token} ({name_of(token)!r})"


def describe(step: Step, name_of: Callable[[int], str]) -> str:
    """Return one line about a step at which system and reference differ."""
    line = f"step {step.index}: {KINDS[step.kind]}; served {shown(step.served, name_of)}"
    if step.served != step.best:
        best = shown(step.best, name_of)
        line += f", the reference's best is {best}, ahead by {amount(step.margin)}"
    if not math.isnan(step.difference):
        line += f"; log-probabilities differ by up to {amount(step.difference)}"
    return line
