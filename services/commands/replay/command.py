"""`twinlens replay`: send recorded requests again, and compare answers and times."""

import argparse
import asyncio
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.process import EXIT_FAILED, EXIT_OK
from common.recording import BadRecording, Recording, read_recording
from services.commands.chat_client import add_url_argument
from services.commands.client import (
    ClientError,
    address,
    prepare_folder,
    run_command,
    whole_number,
)
from services.commands.output import json_line

if TYPE_CHECKING:
    from services.commands.replay.outcome import Replayed
    from services.commands.replay.report import Report

DEFAULT_CONCURRENCY = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what `twinlens serve --record` wrote")
    add_url_argument(parser)
    parser.add_argument(
        "--grpc",
        type=address,
        metavar="HOST:PORT",
        help="the gRPC address for requests that HTTP cannot express: of token ids, or with a "
        "regular expression (default: they are skipped)",
    )
    parser.add_argument(
        "--speed",
        type=speed,
        default=1.0,
        metavar="X",
        help="X times the recorded pace; max: as fast as --concurrency requests at a time are "
        "answered (default: 1)",
    )
    parser.add_argument(
        "--concurrency",
        type=whole_number(1, 4096),
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help="requests at a time with --speed max (default: %(default)s)",
    )
    parser.add_argument(
        "--requests", type=whole_number(1, 10**9), metavar="N", help="send the first N only"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write both answers of every request to requests.jsonl in this folder",
    )
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="answers that differ do not count as a failure, for a load test",
    )
    parser.add_argument("--list", action="store_true", help="show the requests and send nothing")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")


def speed(text: str) -> float:
    """Return how many times the recorded pace; infinity for `max` and 0. An argparse type."""
    try:
        value = math.inf if text == "max" else float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 on nor max")
    return value or math.inf


def run(arguments: argparse.Namespace) -> int:
    """Replay a recording, or list it. Return the exit status: 1 if an answer got worse."""
    status = EXIT_OK

    def work(arguments: argparse.Namespace) -> None:
        nonlocal status
        status = list_requests(arguments) if arguments.list else replay(arguments)

    return run_command(work, arguments) or status


def open_recording(arguments: argparse.Namespace) -> Recording:
    """Return the recording, or raise ClientError if the file cannot be read as one."""
    path = arguments.file
    try:
        recording = read_recording(path)
    except OSError as error:
        raise ClientError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except BadRecording as error:
        raise ClientError(f"cannot read {path}: {error}") from None
    if arguments.requests:
        del recording.exchanges[arguments.requests :]
    return recording


def list_requests(arguments: argparse.Namespace) -> int:
    from services.commands.replay.listing import as_json, as_text

    recording = open_recording(arguments)
    print(json_line(as_json(recording)) if arguments.json else as_text(recording))
    return EXIT_OK


def replay(arguments: argparse.Namespace) -> int:
    """Replay a recording and return the exit status. Ctrl-C ends it with what was answered."""
    from services.commands.replay.report import Report
    from services.commands.replay.sending import send_all

    recording = open_recording(arguments)
    if not recording.exchanges:
        raise ClientError(f"{arguments.file} holds no requests")
    if arguments.out:
        prepare_folder(arguments.out)
    replayed: list[Replayed] = []
    began = time.monotonic()
    try:
        asyncio.run(send_all(recording, arguments, replayed))
    except KeyboardInterrupt:
        if replayed:
            publish(Report(recording, replayed, time.monotonic() - began, True), arguments)
        raise
    report = Report(recording, replayed, time.monotonic() - began)
    publish(report, arguments)
    return EXIT_FAILED if report.is_worse(arguments.allow_differences) else EXIT_OK


def publish(report: "Report", arguments: argparse.Namespace) -> None:
    """Print what is reported, then write the file, which may fail."""
    from services.commands.replay.report import write_requests

    if not arguments.json:
        print(report.text())
    print(json_line(report.summary()), flush=True)
    if arguments.out:
        write_requests(report, arguments.out)
