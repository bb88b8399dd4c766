"""Whether the kernels compute on the card what torch computes.

The tests of the kernels and those that need a card run there, each file in a process of its own:
after a bad access the card accepts nothing more from that process.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.part import Task
from benchmarks.serving import ROOT

FOLDERS = ("tests/kernels", "tests/gpu")
WORKERS = 4
OPTIONS = (
    "-q",
    "-p",
    "pytest_asyncio.plugin",
    "-p",
    "pytest_timeout",
    # The warnings of other versions than the tested ones are no failures.
    "-o",
    "filterwarnings=default",
    "-p",
    "no:cacheprovider",
)
SYSTEM_TESTS = "not system"
"""The part `serve` starts whole systems."""
MAX_REASON_CHARS = 200


def run(task: Task) -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("test_*.py"))]
    workers = 2 if task.dry_run else WORKERS
    with TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        reports = {file: Path(folder) / f"{number}.xml" for number, file in enumerate(files)}
        running = {pool.submit(test, file, reports[file], task): file for file in files}
        for finished in as_completed(running):
            write(task, running[finished], finished.result(), reports[running[finished]])


def test(file: Path, report: Path, task: Task) -> subprocess.CompletedProcess[bytes]:
    dry = ["-p", "benchmarks.gpu.first_tests"] if task.dry_run else []
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *OPTIONS, *dry),
            *("-m", SYSTEM_TESTS, f"--junitxml={report}", str(file)),
        ],
        cwd=ROOT,
        # Plugins that happen to be installed could change what the tests do.
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=False,
        capture_output=True,
    )


def write(
    task: Task, file: Path, done: subprocess.CompletedProcess[bytes], report: Path
) -> None:
    print(done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), flush=True)
    suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    counts = {} if suite is None else {key: int(suite.get(key, 0)) for key in ("tests", "skipped")}
    bad = [] if suite is None else [*failures(suite)]
    tests = counts.get("tests", 0) - counts.get("skipped", 0)
    reason = "; ".join(bad) if suite is not None else f"ended with status {done.returncode}"
    task.row(
        "Tests of the kernels",
        file=str(file.relative_to(ROOT)),
        passed=tests - len(bad),
        failed=len(bad),
        skipped=counts.get("skipped", 0),
        first_failure=reason[:MAX_REASON_CHARS],
        ok=suite is not None and not bad,
    )


def failures(suite: ElementTree.Element) -> Iterator[str]:
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                yield f"{case.get('name')}: {found.get('message', '')}"
