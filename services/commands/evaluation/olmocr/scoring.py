"""The scores of olmOCR-bench: which tests the answers pass, by type and by file.

An answer is the Markdown of a page. With several answers for a page, a test passes in a file's
score if more than half of them pass it, and counts with their share in the score of its type. The
final score is the mean of the files' scores. So does olmOCR's bench (Apache-2.0,
github.com/allenai/olmocr, commit f7cfe4c, olmocr/bench/benchmark.py and utils.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.commands.evaluation.olmocr.bench import Bench, Page
from services.commands.evaluation.olmocr.checks import PASSED, Check, Math
from services.commands.evaluation.olmocr.equations import by_likeness, find_equations, is_within
from services.commands.evaluation.olmocr.katex import Katex, NoMath
from services.commands.evaluation.task import Row, Scores, mean

RESAMPLED = 1000
CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True)
class PageAnswer:
    """An answer for a page; None if there is none, so that it fails every test."""

    page: Page
    text: str | None


@dataclass(frozen=True)
class Verdict:
    """What became of a test: why each answer fails it, or `PASSED`."""

    file: str
    check: Check
    failures: Sequence[str]

    @property
    def share(self) -> float:
        """The share of the answers that pass."""
        return mean([failure == PASSED for failure in self.failures])

    @property
    def has_passed(self) -> bool:
        return self.share > 0.5


def judge(bench: Bench, answers: Sequence[PageAnswer], katex: Path | None) -> Scores:
    """Score the answers by the tests of their pages. `katex` is the folder of KaTeX.

    A page counts if it is in `answers`. Raises NoMath if `katex` is set and cannot be used.
    """
    by_page: dict[Page, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        by_page[answer.page].append(i)
    checks = [(file, check) for file, check in bench.checks if (check.pdf, check.page) in by_page]
    verdicts = []
    parts: list[dict[str, Any]] = [{"passed": [], "failed": {}} for _ in answers]
    with ExitStack() as stack:
        renderer, notes = open_renderer(stack, checks, katex)
        for file, check in checks:
            if isinstance(check, Math) and renderer is None:
                continue
            failures = []
            for i in by_page[check.pdf, check.page]:
                failures.append(failure_of(check, answers[i].text, renderer))
                note(parts[i], check, failures[-1])
            verdicts.append(Verdict(file, check, failures))
    return Scores(rows_of(verdicts), parts, report_of(verdicts), notes)


def open_renderer(
    stack: ExitStack, checks: Iterable[tuple[str, Check]], folder: Path | None
) -> tuple[Katex | None, list[str]]:
    """Return what renders equations, or None and a note for the table if it is missing here."""
    count = sum(isinstance(check, Math) for _, check in checks)
    if not count:
        return None, []
    try:
        return stack.enter_context(Katex(folder)), []
    except NoMath as reason:
        if folder is not None:
            raise
        return None, [f"{count} math tests were skipped: {reason}"]


def failure_of(check: Check, answer: str | None, renderer: Katex | None) -> str:
    """Return why an answer fails a test; `PASSED` if it does not."""
    if answer is None:
        return "there is no answer"
    if not isinstance(check, Math):
        return check.failure(answer)
    assert renderer is not None
    found = find_equations(answer, with_dollars=not check.ignore_dollar_delimited)
    if check.math in found:
        return PASSED
    wanted = renderer.render(check.math)
    if wanted is None:
        return f"KaTeX does not understand the test's {check.math}"
    for equation in by_likeness(found, check.math):
        rendered = renderer.render(equation)
        if rendered is not None and is_within(wanted, rendered):
            return PASSED
    return f"no equation looks like {check.math}"


def note(part: dict[str, Any], check: Check, failure: str) -> None:
    """Add a test to the record of an answer."""
    if failure == PASSED:
        part["passed"].append(check.id)
    else:
        part["failed"][check.id] = failure


def rows_of(verdicts: Sequence[Verdict]) -> list[Row]:
    """Return the scores by type of test, then by file."""
    types = grouped((verdict.check.type, verdict.share) for verdict in verdicts)
    files = grouped((verdict.file, float(verdict.has_passed)) for verdict in verdicts)
    rows = [
        Row(name, len(values), sum(values), metric, mean(values))
        for metric, group in (("rate of type", types), ("rate of file", files))
        for name, values in sorted(group.items())
    ]
    passed = sum(sum(values) for values in files.values())
    return [*rows, Row("olmocr-bench", len(verdicts), passed, "mean of files", mean_of(files))]


def report_of(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the final score with its confidence interval, in percent."""
    files = grouped((verdict.file, float(verdict.has_passed)) for verdict in verdicts)
    (low, high) = confidence_interval(list(files.values()))
    return {
        "Average Score": round(100 * mean_of(files), 1),
        f"{CONFIDENCE:.0%} CI": [round(100 * low, 1), round(100 * high, 1)],
        "Tests": len(verdicts),
    }


def grouped(values: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in values:
        groups[name].append(value)
    return groups


def mean_of(groups: Mapping[str, Sequence[float]]) -> float:
    return mean([mean(values) for values in groups.values()])


def confidence_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the bounds of the mean of the groups' means, from samples of each group itself."""
    random = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLED)
    for values in groups:
        samples = random.choice(values, (RESAMPLED, len(values)))
        means += samples.mean(axis=1) / len(groups)
    tail = 100 * (1 - CONFIDENCE) / 2
    (low, high) = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
