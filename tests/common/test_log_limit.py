"""Lines of one cause are limited, and a later line says how many were left out."""

import logging
import threading
from typing import Any

import pytest

from common.log_limit import MAX_CAUSES, MAX_ENDS, MAX_LINES, WINDOW_SECONDS, LogLimit


class Log:
    """A log behind a limit, on a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.limit = LogLimit(lambda: self.now)

    def write(self, message: Any, level: int = logging.WARNING, *args: object) -> int | None:
        """Write a line; return how many it says were left out, or None if it is left out."""
        record = logging.LogRecord("a", level, "file", 1, message, args, None)
        return getattr(record, "left_out", 0) if self.limit.filter(record) else None


@pytest.fixture
def log() -> Log:
    return Log()


def refused(peer: str) -> dict[str, str]:
    return {"event": "refused a connection", "peer": peer}


def test_ten_lines_of_a_cause_pass_and_the_next_after_the_window_counts_the_rest(log: Log) -> None:
    written = [log.write(refused(f"p-{n}")) for n in range(100_000)]
    assert written == [0] * MAX_LINES + [None] * (100_000 - MAX_LINES)
    log.now += WINDOW_SECONDS
    assert log.write(refused("p")) == 100_000 - MAX_LINES
    assert log.write(refused("p")) == 0


def test_a_flood_of_one_cause_hides_no_other(log: Log) -> None:
    for n in range(1000):
        log.write(refused(str(n)))
    assert log.write(refused("p"), logging.ERROR) == 0
    assert log.write({"event": "peer gone"}) == 0


def test_what_a_library_says_is_limited_by_its_message_without_arguments(log: Log) -> None:
    written = [log.write("accept failed on %s", logging.ERROR, n) for n in range(100)]
    assert written.count(0) == MAX_LINES
    written = [log.write(f"accept() out of resource\nsocket: {n}") for n in range(100)]
    assert written.count(0) == MAX_LINES


def test_an_info_line_about_one_request_always_passes(log: Log) -> None:
    answered = {"event": "answered", "request_id": "r"}
    assert [log.write(answered, logging.INFO) for _ in range(1000)].count(0) == 1000
    assert [log.write(answered) for _ in range(100)].count(None) == 100 - MAX_LINES
    gone = [log.write({"event": "peer gone"}, logging.INFO) for _ in range(100)]
    assert gone.count(None) == 100 - MAX_LINES


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_many_lines_that_say_how_a_request_ended_pass(log: Log, level: int) -> None:
    ended = {"event": "refused", "request_id": "r", "status": 400}
    written = [log.write(ended, level) for _ in range(MAX_ENDS + 5)]
    assert written.count(None) == 5
    log.now += WINDOW_SECONDS
    assert log.write(ended, level) == 5


def test_different_causes_take_bounded_memory_and_are_limited_together(log: Log) -> None:
    written = [log.write({"event": f"cause {n}"}) for n in range(20 * MAX_CAUSES)]
    assert written.count(0) == MAX_CAUSES + MAX_LINES
    assert len(log.limit._windows) == MAX_CAUSES + 1
    log.now += 2 * WINDOW_SECONDS
    assert log.write({"event": "a new cause"}) == 0
    assert len(log.limit._windows) == 2, "the count of the other causes waits to be reported"


def test_what_was_left_out_and_not_reported_is_reported_at_the_end(log: Log) -> None:
    for n in range(MAX_LINES + 5):
        log.write(refused(str(n)))
        log.write(refused(str(n)), logging.ERROR)
        log.write({"event": "frozen"})
    assert log.limit.take_left_out() == {"refused a connection": 10, "frozen": 5}
    assert log.limit.take_left_out() == {}


def test_threads_that_log_at_once_lose_no_count(log: Log) -> None:
    written: list[int | None] = []
    threads = [
        threading.Thread(
            target=lambda: written.extend([log.write(refused("p")) for _ in range(1000)])
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written.count(0) == MAX_LINES
    assert log.limit.take_left_out() == {"refused a connection": 8000 - MAX_LINES}
