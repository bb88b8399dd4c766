"""Shows a load test while it runs, and prints and writes its results."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.commands.bench.figures import (
    IMAGE_STAGES,
    PERCENTILES,
    REQUEST_STAGES,
    itl,
    tokens_of,
    tpot,
    ttft,
)
from services.commands.bench.load import Level
from services.commands.chat_client import Answer

MEASURES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
STAGES = {f"stage_{name}": name.replace("_", " ") for name in (*REQUEST_STAGES, *IMAGE_STAGES)}
COLUMNS = ("mean", *(f"p{percentile}" for percentile in PERCENTILES))


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[Answer | None], None]]:
    """Show a bar on stderr, if that is a terminal.

    Yields what must be called after each step, with its answer if it has one.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]}", style="red"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total, failed="")
        failed = 0

        def report(answer: Answer | None) -> None:
            nonlocal failed
            failed += bool(answer and answer.error)
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")

        yield report


def level_text(level: Level, figures: dict[str, Any]) -> str:
    """Return the figures of one level for people: what was done, and a table of times."""
    done = (
        f"{level.name}: {figures['succeeded_requests']} of {figures['requests']} requests in "
        f"{figures['duration_seconds']:.1f} s; {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['images_per_second']:.2f} images/s, "
        f"{figures['output_tokens_per_second']:.1f} tokens/s "
        f"({figures['output_tokens_mean']:.4g} tokens each)"
    )
    lines = [done, *problems(figures)]
    if "goodput_share" in figures:
        lines.append(
            f"within the SLO: {figures['goodput_share']:.1%} of the requests, "
            f"{figures['goodput_requests_per_second']:.2f} requests/s"
        )
    return "\n".join([*lines, *table(figures)])


def problems(figures: dict[str, Any]) -> Iterator[str]:
    """Yield what the reader of the figures must know before believing them."""
    if figures["rejected_requests"]:
        yield f"refused with status 429: {figures['rejected_requests']}"
    for kind, number in figures["failures"].items():
        yield f"failed: {number} ({kind})"
    if figures["client_busy_share"] > 0.7:
        yield f"this client used {figures['client_busy_share']:.0%} of a core, and may be the limit"


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of times in milliseconds."""
    yield " " * 14 + "".join(f"{name + ' ms':>12}" for name in COLUMNS)
    for key, name in (MEASURES | STAGES).items():
        if f"{key}_mean_seconds" in figures:
            cells = [1000 * figures[f"{key}_{column}_seconds"] for column in COLUMNS]
            yield f"{name:<14}" + "".join(f"{cell:>12,.1f}" for cell in cells)


def write_results(folder: Path, results: dict[str, Any], levels: Sequence[Level]) -> None:
    """Write results.json and requests.jsonl."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    with (folder / "requests.jsonl").open("w", encoding="utf-8") as file:
        for level in levels:
            for answer in level.answers:
                file.write(json.dumps(answer_record(level, answer)) + "\n")


def answer_record(level: Level, answer: Answer) -> dict[str, Any]:
    """Return what requests.jsonl says about one request."""
    return {
        "level": level.name,
        "sent_seconds": answer.began - level.began,
        "ttft_seconds": ttft(answer),
        "tpot_seconds": tpot(answer),
        "e2e_seconds": answer.seconds,
        "itl_seconds": itl(answer),
        "output_tokens": tokens_of(answer),
        "text": answer.text,
        "status": answer.status,
        "finish_reason": answer.finish_reason,
        "error": answer.error,
        "usage": answer.usage,
        "timings": answer.timings,
    }


def note(text: str) -> None:
    """Say something on stderr that is not a result."""
    print(f"twinlens: {text}", file=sys.stderr, flush=True)
