"""Whether the kernels compute on the card what torch computes.

The tests of the kernels and those that need a card run there, each file in a process of its own:
after a bad access the card accepts nothing more from that process.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from benchmarks.gpu.part import Task
from benchmarks.serving import ROOT

FOLDERS = ("tests/kernels", "tests/gpu")
WORKERS = 4
OPTIONS = (
    *("-q", "-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-p", "no:cacheprovider"),
    # What other versions than the tested ones warn of is not a failure.
    *("-o", "filterwarnings=default"),
)
NO_SYSTEMS = "not system"
"""The part `serve` starts whole systems."""
PYTEST_HAS_ENDED = (0, 1, 5)
"""The exit statuses of pytest when all tests passed, some failed, or none was left to run."""
INTERRUPTED = (2, -signal.SIGINT)
"""The exit statuses of pytest if it was interrupted; the second before its first test."""
STOP_SECONDS = 15.0
"""The tests are interrupted this long before the part is, so that what they found is written."""
REPORT_SECONDS = 12.0
"""How long pytest then has for its report: it waits for processes that compile."""
MAX_REASON_CHARS = 200


def run(task: Task) -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("test_*.py"))]
    batches = [files] if task.dry_run else [[file] for file in files]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        running = {
            pool.submit(test, task, batch, Path(folder) / f"{number}.xml"): batch
            for number, batch in enumerate(batches)
        }
        for finished in as_completed(running):
            for file in running[finished]:
                write(task, file, *finished.result())


def test(task: Task, files: list[Path], report: Path) -> tuple[int, list[ElementTree.Element]]:
    """Run the tests of some files. Return pytest's exit status, and its report of each test.

    The report has the tests that ended before the time was up.
    """
    seconds = task.seconds_left - STOP_SECONDS
    if seconds <= 0:
        return INTERRUPTED[0], []
    how = ["-p", "benchmarks.gpu.first_tests"] if task.dry_run else in_parallel()
    command = [sys.executable, "-m", "pytest", *OPTIONS, *how, "-m", NO_SYSTEMS]
    with subprocess.Popen(
        [*command, f"--junitxml={report}", *map(str, files)],
        cwd=ROOT,
        # Plugins that happen to be installed could change what the tests do.
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        print(output_of(process, seconds).decode(errors="replace"), flush=True)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return process.returncode, cases


def output_of(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Return what a process prints. It is interrupted if it takes longer, and killed in the end."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=REPORT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
    return process.communicate()[0]


def in_parallel() -> list[str]:
    """Return the options to run a file's tests in several processes, if pytest-xdist is there."""
    has_xdist = importlib.util.find_spec("xdist") is not None
    return ["-p", "xdist.plugin", "-n", str(WORKERS)] if has_xdist else []


def write(task: Task, file: Path, status: int, cases: list[ElementTree.Element]) -> None:
    """Write the row of one file."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    own = [case for case in cases if name in (case.get("classname"), case.get("name"))]
    bad = [failure for case in own for failure in failures(case)]
    skipped = sum(case.find("skipped") is not None for case in own)
    has_ended = status in PYTEST_HAS_ENDED
    ended = "no time was left" if status in INTERRUPTED else f"pytest ended with status {status}"
    reason = bad[0] if bad else "" if has_ended else ended
    task.row(
        "Tests of the kernels",
        file=str(file.relative_to(ROOT)),
        passed=len(own) - skipped - len(bad),
        failed=len(bad),
        skipped=skipped,
        first_failure=reason[:MAX_REASON_CHARS],
        ok=has_ended and not bad,
    )


def failures(case: ElementTree.Element) -> Iterator[str]:
    for kind in ("failure", "error"):
        for found in case.findall(kind):
            yield f"{case.get('name')}: {found.get('message', '')}"
