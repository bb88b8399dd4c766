"""The parts of `scripts/gpu`, with the small model and the stand-ins of a dry run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.gpu.part import Task
from benchmarks.gpu.parts import kernels, profile, speed
from benchmarks.gpu.served import write as write_level
from benchmarks.gpu.setup import Setup
from benchmarks.serving import ROOT
from services.llm.attention_backends.by_varlen import ByVarlen


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A part of a dry run, with one backend of attention."""
    monkeypatch.setattr(Setup, "backends", lambda *_: [ByVarlen])
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    return Task("a part", rows, 100.0, True, tmp_path)


def rows_of(task: Task, table: str) -> list[dict[str, Any]]:
    rows = map(json.loads, task.rows.read_text().splitlines())
    return [row for row in rows if row["table"] == table]


def test_speed_measures_language_and_vision_next_to_limits(task: Task) -> None:
    speed.run(task)
    rows = rows_of(task, "Speed")
    assert [(row["weights"], row["limit"]) for row in rows] == [
        *[("bfloat16", "products")] * 2,
        *[("bfloat16", "memory")] * 2,
        *[("bfloat16", "products")] * 2,
        *[("FP8", "memory")] * 2,
        *[("int4", "memory")] * 2,
    ]
    assert all(row["ms"] > 0 and row["share_of_limit"] > 0 for row in rows)
    [overhead] = rows_of(task, "Scheduling and Python")
    assert 0 <= overhead["share_of_step"] < 1
    assert task.num_failed == 0


def test_a_profile_has_the_kernels_by_their_time(task: Task) -> None:
    profile.run(task)
    assert [row["batch"] for row in rows_of(task, "Profile of a decode step")] == [1, 3]
    kernels = rows_of(task, "Kernels of a decode step at batch 3")
    times = [row["ms"] for row in kernels]
    assert times == sorted(times, reverse=True)
    assert 0.5 < sum(row["share_of_kernels"] for row in kernels) <= 1 + 1e-9


def test_gaps_are_the_time_in_which_no_kernel_runs() -> None:
    spans = [("a", 0.0, 5.0), ("b", 2.0, 3.0), ("c", 7.0, 8.0), ("a", 8.0, 9.0)]
    assert profile.gaps(spans) == 2.0
    assert profile.longest(spans)[0] == ("a", (2, 6.0))
    assert profile.shortened("void at::gemm<float, 3>(int)") == "at::gemm"


def test_a_case_that_fails_is_a_row_and_the_part_goes_on(task: Task) -> None:
    with task.attempt("Speed", case="first"):
        raise RuntimeError("no kernel image")
    with task.attempt("Speed", case="second"):
        task.row("Speed", case="second", ok=True)
    first, second = rows_of(task, "Speed")
    assert first["error"] == "RuntimeError: no kernel image" and first["ok"] is False
    assert second["ok"] and task.num_failed == 1


REPORT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_sampling" name="good"/>
<testcase classname="tests.kernels.test_sampling" name="bad">
<failure message="1 is not 2"/></testcase>
<testcase classname="tests.kernels.test_sampling" name="away"><skipped/></testcase>
<testcase classname="tests.kernels.test_pointwise" name="other"/>
</testsuite></testsuites>"""


def test_a_files_tests_are_counted(task: Task) -> None:
    cases = list(ElementTree.fromstring(REPORT).iter("testcase"))
    file = ROOT / "tests" / "kernels" / "test_sampling.py"
    kernels.write(task, file, 1, cases)
    kernels.write(task, file, -11, [])
    failed, died = rows_of(task, "Tests of the kernels")
    assert (failed["passed"], failed["failed"], failed["skipped"]) == (1, 1, 1)
    assert failed["first_failure"] == "bad: 1 is not 2" and not failed["ok"]
    assert died["first_failure"] == "pytest ended with status -11" and not died["ok"]


def test_files_for_which_no_time_is_left_are_rows(task: Task) -> None:
    task.seconds = kernels.STOP_SECONDS
    kernels.run(task)
    rows = rows_of(task, "Tests of the kernels")
    assert len(rows) == task.num_failed > 10
    assert {row["first_failure"] for row in rows} == {"no time was left"}


REPORTS_WHEN_INTERRUPTED = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
signal.sigwait([signal.SIGINT])
print("report")
"""


def test_tests_that_take_too_long_still_report() -> None:
    command = [sys.executable, "-c", REPORTS_WHEN_INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert kernels.output_of(process, 0.0) == b"report\n"
    assert process.returncode == 0


def test_a_level_without_an_answer_has_no_times(task: Task) -> None:
    figures = {"concurrency": 1, "requests": 4, "succeeded_requests": 0}
    rates = ("output_tokens_per_second", "images_per_second", "client_busy_share")
    write_level(task, "Serving", "a system", figures | dict.fromkeys(rates, 0.0))
    [row] = rows_of(task, "Serving")
    assert row["ttft_ms"] is None and row["reached"] is None and row["ok"] is False


def test_a_level_is_compared_with_what_is_wanted(task: Task) -> None:
    figures = {"concurrency": 1, "requests": 4, "succeeded_requests": 4, "ttft_p50_seconds": 0.1}
    rates = ("output_tokens_per_second", "images_per_second", "client_busy_share")
    write_level(task, "Serving", "a system", figures | dict.fromkeys(rates, 0.0))
    [row] = rows_of(task, "Serving")
    assert row["ttft_ms"] == 100 and row["reached"] is False and row["ok"] is True
