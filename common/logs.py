"""Logging with structlog: readable on a terminal, JSON otherwise.

The loggers of the standard library take the same way.
"""

import logging
import os
import sys

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger


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
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=final_processors(console)
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    for name in ("uvicorn", "grpc", "asyncio"):  # they log their own start and stop
        logging.getLogger(name).setLevel(logging.WARNING)


def final_processors(console: bool) -> list[Processor]:
    """Return what formats a line. Tracebacks have no locals, which may hold prompts."""
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if console:
        colors = sys.stderr.isatty() or "FORCE_COLOR" in os.environ
        return [
            drop,
            structlog.dev.ConsoleRenderer(
                colors=colors, exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    return [drop, tracebacks, structlog.processors.JSONRenderer()]


def add_origin(service: str) -> Processor:
    """Return a processor that adds the name of the service."""

    def processor(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    return processor
