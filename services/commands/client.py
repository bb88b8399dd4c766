"""What the commands that talk to a running system share: flags, the gRPC channel, and errors."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from common.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from services.commands.output import one_line

NEEDS_TOOLS = "needs the extra `tools`: pip install 'twinlens[tools]'"
DEFAULT_TARGET = "127.0.0.1:50051"
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A proxy that the environment sets is not meant for this address.
    ("grpc.enable_http_proxy", 0),
    # By default, channels share connections, and with them the back-off after a failure.
    ("grpc.use_local_subchannel_pool", 1),
)


class ClientError(Exception):
    """A request failed; the message tells the user why."""


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the commands that ask a running system once."""
    add_grpc_argument(parser)
    parser.add_argument("--json", action="store_true", help="print only one JSON object")


def add_grpc_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grpc",
        default=DEFAULT_TARGET,
        type=address,
        metavar="HOST:PORT",
        help="the gateway's gRPC address (default: %(default)s)",
    )


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers in this range."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return int(text)

    return parse


def positive(text: str) -> float:
    """Return a positive number; an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def address(text: str) -> str:
    """Return the text if it has the form HOST:PORT; an argparse type."""
    if not re.fullmatch(r".+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} does not have the form HOST:PORT")
    return text


def run_command(work: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Do a command's work and return the exit status; an error is one line on stderr."""
    try:
        work(arguments)
    except ClientError as error:
        print(f"twinlens: {one_line(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_OK


@contextmanager
def connect(target: str) -> Iterator[grpc.Channel]:
    """Open a channel, which cancels the calls in flight when it closes.

    Raises
    ------
    ClientError
        If a call fails.
    """
    try:
        with grpc.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
            yield channel
    except grpc.RpcError as error:
        raise ClientError(explain(error, target)) from error


def explain(error: grpc.RpcError, target: str) -> str:
    """Return what went wrong in the user's terms."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code = error.code()
    details = error.details() or "no details"
    if code == grpc.StatusCode.UNAVAILABLE and details.startswith("failed to connect"):
        return (
            f"nothing answers at {target}: start it with `twinlens serve`, or set "
            "its address with --grpc HOST:PORT"
        )
    return f"{target} says {code.name}: {details}"


def read_file(path: Path) -> bytes:
    """Return the contents of a file.

    Raises
    ------
    ClientError
        If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ClientError(f"cannot read {path}: {reason}") from error


def prepare_folder(folder: Path) -> None:
    """Make a folder for results, before the work that they cost.

    Raises
    ------
    ClientError
        If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> ClientError:
    return ClientError(f"cannot write {path}: {(error.strerror or str(error)).lower()}")


def as_dict(message: Message) -> dict[str, Any]:
    """Return the message's fields by their proto names, those with default values included."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
