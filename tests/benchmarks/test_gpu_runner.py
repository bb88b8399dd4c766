"""The runner of `scripts/gpu`: a part that fails, hangs or dies costs its own figures only."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.processes import descendants
from benchmarks.serving import ROOT

RUNNER = """
import signal, sys
from pathlib import Path
from benchmarks.gpu.processes import adopt_orphans
from benchmarks.gpu.runner import Files, Part, run

signal.signal(signal.SIGTERM, signal.default_int_handler)
adopt_orphans()
folder, seconds, *sources = sys.argv[1:]
parts = [
    Part(f"part{i}", 1.0 + 9 * i, [sys.executable, "-c", source])
    for i, source in enumerate(sources)
]
for result in run(parts, float(seconds), Files(Path(folder)), {"device": "none"}):
    print(result.status)
"""
HEAD = """
import json, os, signal, subprocess, sys, time
name, rows, seconds = sys.argv[1:]
def row(**figures):
    with open(rows, "a") as f:
        f.write(json.dumps({"part": name, "table": "A table"} | figures) + "\\n")
"""
GOOD = HEAD + "row(value=1)"
FAILS = HEAD + "row(value=2); raise ValueError('a reason')"
SKIPS = HEAD + "print('not here'); sys.exit(77)"
DIES = HEAD + "row(value=3); os.kill(os.getpid(), signal.SIGSEGV)"
HANGS = (
    HEAD
    + """
row(value=4)
# A child in a session of its own, which would survive its parent.
daemon = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
)
row(daemon=daemon.pid)
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(600)
"""
)
LEAVES_A_DAEMON = HANGS.replace("time.sleep(600)\n", "", 1).replace("\ntime.sleep(600)\n", "\n")


def command(folder: Path, seconds: float, *parts: str) -> list[str]:
    return [sys.executable, "-c", RUNNER, str(folder), str(seconds), *parts]


def run(folder: Path, seconds: float, *parts: str) -> list[dict[str, Any]]:
    """Run parts given by their source, and return the lines of gpu.jsonl after the first."""
    subprocess.run(command(folder, seconds, *parts), cwd=ROOT, check=True, timeout=100)
    machine, *results = map(json.loads, (folder / "gpu.jsonl").read_text().splitlines())
    assert machine == {"part": "machine", "device": "none"}
    return results


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists()


def test_each_part_ends_in_its_own_way_and_its_rows_are_kept(tmp_path: Path) -> None:
    results = run(tmp_path, 1000, GOOD, FAILS, SKIPS, DIES, GOOD)
    assert [(each["status"], each["reason"]) for each in results] == [
        ("ok", ""),
        ("failed", "ValueError: a reason"),
        ("skipped", "not here"),
        ("failed", f"ended by signal {signal.SIGSEGV.value}"),
        ("ok", ""),
    ]
    assert [[row["value"] for row in each["rows"]] for each in results] == [[1], [2], [], [3], [1]]
    table = (tmp_path / "gpu.md").read_text()
    assert "| part1 | failed |" in table and "### A table\n\n| value |\n| --- |\n| 1 |" in table
    log = (tmp_path / "gpu.log").read_text()
    assert "== part1 ==" in log and "a reason" in log


def test_a_part_that_hangs_is_ended_with_all_its_children_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    hung, good = run(tmp_path, 22, HANGS, GOOD)
    assert (hung["status"], good["status"]) == ("timed out", "ok")
    value, daemon = hung["rows"]
    assert value["value"] == 4 and not lives(daemon["daemon"])
    assert hung["seconds"] >= hung["limit_seconds"]


def test_a_daemon_does_not_outlive_a_part_that_ends(tmp_path: Path) -> None:
    [result] = run(tmp_path, 1000, LEAVES_A_DAEMON)
    assert result["status"] == "ok" and not lives(result["rows"][1]["daemon"])


def test_time_that_a_part_leaves_over_is_for_the_others(tmp_path: Path) -> None:
    first, last = run(tmp_path, 1000, GOOD, GOOD)
    assert first["limit_seconds"] < 100 and 910 < last["limit_seconds"] <= 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_measured_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    given = command(tmp_path, 1000, GOOD, HANGS, GOOD)
    with subprocess.Popen(given, cwd=ROOT, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout
        assert any(line.startswith("part1") for line in runner.stdout)
        while "daemon" not in (tmp_path / "gpu.rows.jsonl").read_text():
            os.sched_yield()
        started = descendants(runner.pid)
        assert len(started) == 2
        runner.send_signal(number)
        assert runner.stdout.read().splitlines()[-2:] == ["ok", "interrupted"]
        assert runner.wait(60) == 0
    assert not any(map(lives, started))
    results = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [each["part"] for each in results] == ["machine", "part0", "part1"]
    assert results[-1]["rows"][0]["value"] == 4


def test_a_row_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    [result] = run(tmp_path, 1000, GOOD + "\nopen(rows, 'a').write('{\"part\": ')")
    assert result["rows"] == [{"table": "A table", "value": 1}]
