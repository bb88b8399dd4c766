"""Runs the parts of a measurement one after another, each as a process with a time limit.

A part that fails, hangs or dies costs its own figures only. What a part has measured is written to
files at once, so that it is kept whatever happens to the rest of the run:

gpu.rows.jsonl  one line for each row of a table, as it is measured
gpu.jsonl       one line about the machine, then one for each part that ended, with its rows
gpu.md          the tables, written again after each part
gpu.log         what the parts printed
"""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.table import markdown

OK = "ok"
FAILED = "failed"
SKIPPED = "skipped"
TIMED_OUT = "timed out"
INTERRUPTED = "interrupted"
EXIT_SKIPPED = 77
"""The exit status of a part that cannot run here; its last line of output says why."""
MAX_REASON_CHARS = 300
GRACE_SECONDS = 5.0
"""A part is interrupted this long before its time is up, so that it can stop what it started."""


@dataclass(frozen=True)
class Part:
    """A process that measures something."""

    name: str
    weight: float
    """Its share of the time, as a ratio to the weights of the other parts."""
    command: list[str]
    """Gets three more arguments: the name of the part, the file for its rows, and its seconds."""


@dataclass
class Result:
    """How a part ended, and what it measured until then."""

    part: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    limit_seconds: float = 0.0
    dry_run: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)


class Files:
    """The files of a run, which begin empty."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = folder / "gpu.rows.jsonl"
        self.results = folder / "gpu.jsonl"
        self.table = folder / "gpu.md"
        self.log = folder / "gpu.log"
        for file in (self.rows, self.results, self.table, self.log):
            file.write_text("")

    def add_result(self, line: dict[str, Any]) -> None:
        append_line(self.results, line)

    def rows_of(self, part: str) -> list[dict[str, Any]]:
        """Return the rows that a part has written, without one that it did not finish."""
        return [row for row in read_lines(self.rows) if row.pop("part") == part]


def append_line(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as f:
        f.write(json.dumps(line) + "\n")


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def run(
    parts: Sequence[Part],
    seconds: float,
    files: Files,
    machine: dict[str, Any],
    dry_run: bool = False,
) -> list[Result]:
    """Run all parts within `seconds`, and return how each ended.

    A part may use the time that earlier ones left over. An interruption ends the part in progress;
    the results until then are written and returned.
    """
    files.add_result({"part": "machine"} | machine)
    deadline = time.monotonic() + seconds
    results: list[Result] = []
    for number, part in enumerate(parts):
        share = part.weight / sum(other.weight for other in parts[number:])
        limit = max(0.0, deadline - time.monotonic()) * share
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        result = run_part(part, limit, files)
        result.dry_run = dry_run
        result.rows = files.rows_of(part.name)
        results.append(result)
        files.add_result(asdict(result))
        files.table.write_text(markdown(machine, [*map(asdict, results)], dry_run))
        print(f"{part.name}: {result.status} in {result.seconds:.0f} s {result.reason}", flush=True)
        if result.status == INTERRUPTED:
            break
    return results


def run_part(part: Part, limit: float, files: Files) -> Result:
    """Run one part; nothing that it started is left when this returns."""
    began = time.monotonic()
    grace = min(GRACE_SECONDS, limit / 2)
    status = ""
    with files.log.open("ab") as log:
        log.write(f"\n== {part.name} ==\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            [*part.command, part.name, str(files.rows), f"{limit - grace:.1f}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit - grace)
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            processes.end(process, grace)
            processes.end_orphans()
    seconds = time.monotonic() - began
    reason = ""
    if not status:
        status = {0: OK, EXIT_SKIPPED: SKIPPED}.get(process.returncode, FAILED)
        reason = reason_of(process.returncode, files.log.read_bytes()[start:])
    return Result(part.name, status, reason, round(seconds, 1), round(limit, 1))


def reason_of(status: int, output: bytes) -> str:
    """Return why a part ended with this exit status: the last line that it printed."""
    if status == 0:
        return ""
    if status < 0:
        return f"ended by signal {-status}"
    lines = output.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last[:MAX_REASON_CHARS] or f"exit status {status}"
