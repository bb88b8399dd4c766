"""Logging with structlog: readable on a terminal, JSON otherwise.

The loggers of the standard library, and Python's warnings, take the same way. Text from outside can
neither fill a log nor forge a line of it: long values are cut, lines of one cause are limited in
number (`common/log_limit.py`), and control characters are escaped.
"""

import atexit
import logging
import os
import sys
import traceback
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, FilteringBoundLogger, Processor, WrappedLogger

from common.errors import shorten
from common.log_limit import LogLimit

MAX_VALUE_CHARS = 500
MAX_TRACEBACK_LINES = 200

log_limit = LogLimit()
"""The limit on the lines of this process."""


def get_logger() -> FilteringBoundLogger:
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def wants_console(log_format: str) -> bool:
    """Whether logs in this format are for people: `auto` is, on a terminal."""
    return log_format == "console" or (log_format == "auto" and sys.stderr.isatty())


def set_up_logging(service: str, log_format: str, log_level: str) -> None:
    """Send all logs to stderr, because stdout is for the output of commands."""
    console = wants_console(log_format)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
        add_origin(service),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, log_level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(log_limit)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=final_processors(console)
        )
    )
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    atexit.register(report_left_out)
    root.setLevel(log_level.upper())
    for name in ("uvicorn", "grpc", "asyncio"):  # they log their own start and stop
        logging.getLogger(name).setLevel(logging.WARNING)


def report_left_out() -> None:
    """Log how many lines were left out and not reported yet.

    This happens at exit. A process that skips exit handlers calls it itself.
    """
    if left_out := log_limit.take_left_out():
        get_logger().warning("log lines were left out", left_out=left_out)


def final_processors(console: bool) -> list[Processor]:
    """Return what formats a line. Tracebacks have no locals, which may hold prompts."""
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if console:
        colors = sys.stderr.isatty() or "FORCE_COLOR" in os.environ
        return [
            add_left_out,
            drop,
            cut_values,
            escape_values,
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=write_traceback),
        ]
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    return [add_left_out, drop, tracebacks, cut_values, structlog.processors.JSONRenderer()]


def add_left_out(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add how many lines of the same cause were left out before this one."""
    if left_out := getattr(event["_record"], "left_out", 0):
        event["left_out"] = left_out
    return event


def cut_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Cut all values that are long."""
    return {key: value if key == "exc_info" else cut(value) for key, value in event.items()}


def cut(value: Any) -> Any:
    """Return a value with all texts in it cut; what is not JSON becomes text."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return shorten(value, MAX_VALUE_CHARS)
        case list() | tuple():
            return [cut(each) for each in value]
        case dict():
            return {key: cut(each) for key, each in value.items()}
    return shorten(repr(value), MAX_VALUE_CHARS)


def escape_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters, which could forge a line or command a terminal."""
    return {key: escape(value) if isinstance(value, str) else value for key, value in event.items()}


def escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def write_traceback(output: TextIO, exc_info: ExcInfo) -> None:
    """Write a traceback, of which an error's message may be as long as its author likes."""
    lines = "".join(traceback.format_exception(exc_info[1])).splitlines()
    output.write("\n")
    output.write(
        "\n".join(shorten(escape(line), MAX_VALUE_CHARS) for line in lines[-MAX_TRACEBACK_LINES:])
    )


def add_origin(service: str) -> Processor:
    """Return a processor that adds the name of the service."""

    def processor(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    return processor
