"""Logs are one JSON object per line, or readable on a terminal, and never have values of locals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import logging, sys, warnings
import structlog
from common.logs import get_logger, set_up_logging

def fail():
    secret = "-".join(("what", "a", "prompt", "says"))
    raise ValueError("spoilt")

early = get_logger()  # modules take theirs before logging is set up
set_up_logging("vision", sys.argv[1], "info")
log = early.bind(member="v-1")
log.debug("not told")
log.info("ready", num_patches=4, path=sys, text="größer")
logging.getLogger("library").warning("a library says %s", "hello")
logging.getLogger("library").debug("not told")
warnings.warn("a library advises")
structlog.contextvars.bind_contextvars(request_id="r-7")
try:
    fail()
except ValueError:
    log.exception("failed")
    logging.getLogger("library").exception("failed too")
"""


def logged(log_format: str, program: str = PROGRAM) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, log_format],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert not done.stdout
    return done.stderr


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged("json").splitlines()]


def test_json_has_one_object_per_line_with_the_same_keys_for_us_and_libraries() -> None:
    ready, library, warning, failed, _ = lines()
    assert warning.keys() == library.keys() and "a library advises" in warning["event"]
    common = {"event", "level", "timestamp", "service"}
    assert ready.keys() == common | {"member", "num_patches", "path", "text"}
    assert (
        ready["event"],
        ready["level"],
        ready["service"],
        ready["member"],
        ready["num_patches"],
    ) == (
        "ready",
        "info",
        "vision",
        "v-1",
        4,
    )
    assert ready["timestamp"].endswith("Z") and ready["text"] == "größer"
    assert library.keys() == common
    assert (library["event"], library["level"]) == ("a library says hello", "warning")
    assert failed["level"] == "error"


def test_every_line_has_the_request_id_of_the_context() -> None:
    ready, _, _, failed, failed_too = lines()
    assert failed["request_id"] == failed_too["request_id"] == "r-7"
    assert "request_id" not in ready


def test_a_traceback_in_json_has_frames_but_no_locals() -> None:
    for line in lines()[3:]:
        (error,) = line["exception"]
        assert (error["exc_type"], error["exc_value"]) == ("ValueError", "spoilt")
        assert [frame["name"] for frame in error["frames"]] == ["<module>", "fail"]
        assert not any(frame.get("locals") for frame in error["frames"])


def test_auto_is_json_without_a_terminal() -> None:
    assert json.loads(logged("auto").splitlines()[0])["event"] == "ready"


def test_the_console_format_is_readable() -> None:
    first, *rest = logged("console").splitlines()
    assert "[info     ] ready" in first and "num_patches=4" in first and "service=vision" in first
    assert "\x1b" not in first
    assert any("ValueError: spoilt" in line for line in rest)


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_log_holds_the_value_of_a_local_variable(log_format: str) -> None:
    said = logged(log_format)
    assert "spoilt" in said
    assert "what-a-prompt-says" not in said


FLOOD = """
import logging, sys
from common.logs import get_logger, set_up_logging
from common.process import leave

set_up_logging("vision", sys.argv[1], "info")
log = get_logger()
for n in range(1000):
    log.warning("refused a connection", peer=f"p-{n}", reason="x" * 5_000_000)
    logging.getLogger("library").warning("cannot accept %s", n)
    log.info("answered", request_id=f"r-{n}") if n < 30 else None
log.error("named\\nforged \x1b[31m", lines=["y" * 10_000], given=b"z" * 10_000)
try:
    raise ValueError("v" * 5_000_000)
except ValueError:
    log.exception("failed")
    logging.getLogger("library").exception("failed too %s", "w" * 10_000)
leave(0)
"""


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_flood_of_lines_and_long_values_stays_small_and_is_counted(log_format: str) -> None:
    said = logged(log_format, FLOOD)
    assert len(said) < 30_000
    assert said.count("refused a connection") == said.count("cannot accept") == 10 + 1
    assert said.count("answered") == 30
    assert " (4,999,500 characters left out)" in said
    assert "z" * 501 not in said and "w" * 501 not in said
    assert "\x1b" not in said and "\nforged" not in said
    last = said.splitlines()[-1]
    assert "log lines were left out" in last and last.count("990") == 2
