"""`twinlens generate`: a running system asked over gRPC; and what every command that asks one
needs."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50051"
DONE = 0
FAILED = 1
INTERRUPTED = 130

# An HTTP proxy of the environment is not meant for this address.
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)

FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


class ClientError(Exception):
    """Why there is no answer, for the person who asked."""


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text of the user turn; the images come before it")
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a PNG, JPEG, WebP or GIF file; repeatable",
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1, 2**32 - 1),
        metavar="N",
        help="default: what is left of the context",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 always takes the likeliest token; default: the model's own",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens that together have this probability",
    )
    parser.add_argument(
        "--top-k",
        type=whole_number(0, 2**31),
        metavar="N",
        help="draw from this many of the likeliest tokens; 0: from all",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**64 - 1),
        metavar="N",
        help="the same seed gives the same answer again",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on past the model's end token"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grpc",
        default=DEFAULT_TARGET,
        type=address,
        metavar="HOST:PORT",
        help="the gateway's gRPC address (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A type for argparse, whose complaint names what is allowed."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return int(text)

    return parse


def address(text: str) -> str:
    if not re.fullmatch(r".+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def generate(arguments: argparse.Namespace) -> int:
    """Streams the answer to stdout; with --json prints it whole. The exit status is returned."""
    return guarded(print_answer if arguments.json else stream_answer, arguments)


def guarded(work: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Runs a command's work; what can go wrong ends as one line on stderr."""
    try:
        work(arguments)
    except ClientError as error:
        print(f"twinlens: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Who read our output has enough. Python flushes stdout once more at exit, which must not
        # complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def print_answer(arguments: argparse.Namespace) -> None:
    request = inference_pb2.GenerateRequest(**request_fields(arguments))
    with connected(arguments.grpc) as channel:
        response = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            request, timeout=arguments.timeout
        )
    answer = {
        "request_id": response.request_id,
        "text": response.text,
        "token_ids": list(response.token_ids),
        "finish_reason": FINISH_REASONS[response.finish_reason],
        "usage": as_dict(response.usage),
        "timings": as_dict(response.timings),
    }
    print(json.dumps(answer, ensure_ascii=False))


def stream_answer(arguments: argparse.Namespace) -> None:
    request = inference_pb2.GenerateStreamRequest(**request_fields(arguments))
    with connected(arguments.grpc) as channel:
        for response in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
            request, timeout=arguments.timeout
        ):
            print(response.delta.text, end="", flush=True)
    print(flush=True)


def request_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    sampling = {
        name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k", "seed")
    }
    stopping = {
        "max_tokens": arguments.max_tokens,
        "ignore_eos": arguments.ignore_eos,
        "stop": arguments.stop,
    }
    return {
        "text": arguments.prompt,
        "images": [inference_pb2.Image(data=read_file(path)) for path in arguments.image],
        "sampling": inference_pb2.SamplingParams(**sampling),
        "stopping": inference_pb2.StoppingParams(**stopping),
    }


def read_image(target: str, path: Path, prompt: str) -> tuple[str, dict[str, Any]]:
    """The text that the system at `target` reads in an image, and how long each stage took. Raises
    ClientError."""
    request = inference_pb2.GenerateRequest(
        text=prompt,
        images=[inference_pb2.Image(data=read_file(path))],
        sampling=inference_pb2.SamplingParams(temperature=0),
    )
    with connected(target) as channel:
        response = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
    return response.text, as_dict(response.timings)


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}"
        ) from error


@contextmanager
def connected(target: str) -> Iterator[grpc.Channel]:
    """A channel, whose end cancels what is under way; its errors are ClientErrors."""
    try:
        with grpc.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
            yield channel
    except grpc.RpcError as error:
        raise ClientError(explained(error, target)) from error


def explained(error: grpc.RpcError, target: str) -> str:
    assert isinstance(error, grpc.Call)
    code = error.code()
    details = error.details() or "no more is told"
    if code == grpc.StatusCode.UNAVAILABLE and details.startswith("failed to connect"):
        return (
            f"nothing answers at {target}: start it with `twinlens serve`, or give "
            "its address with --grpc HOST:PORT"
        )
    return f"{target} says {code.name}: {details}"


def as_dict(message: Message) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
