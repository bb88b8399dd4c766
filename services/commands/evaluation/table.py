"""The table of scores, as the seeds of the benchmarks print it and as Markdown."""

import json
from collections.abc import Sequence

from services.commands.evaluation.task import Row, Scores

HEADERS = ("Tasks", "N-Shot", "Total", "Pass", "Metric", "Value")
"""The columns of MindIE-LLM's modeltest (modeltest/metric/acc.py)."""
SHOTS = 0
"""No task shows examples in its prompt."""


def markdown(scores: Scores, facts: dict[str, str]) -> str:
    """Return the scores as a Markdown table.

    Below it stand the benchmark's own form of them, if it has one, and how they came about: `facts`
    are names and their values.
    """
    lines = table(scores.rows)
    if scores.report:
        report = json.dumps(scores.report, indent=4, ensure_ascii=False)
        lines += ["", "```json", *report.splitlines(), "```"]
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [f"- {note}" for note in scores.notes]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table, with columns of equal width."""
    cells = [HEADERS, *(cells_of(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADERS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def cells_of(row: Row) -> tuple[str, ...]:
    return (
        row.task.replace("|", "\\|"),
        str(SHOTS),
        str(row.total),
        f"{row.passed:.10g}" if row.passed == int(row.passed) else f"{row.passed:.2f}",
        row.metric,
        f"{row.value:.4f}",
    )
