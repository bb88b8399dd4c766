"""`twinlens generate`: ask a running system over gRPC, and print its answer."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.image_formats import IMAGE_FORMATS
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.client import (
    ClientError,
    add_client_arguments,
    as_dict,
    connect,
    read_file,
    run_command,
    whole_number,
)
from services.commands.output import answer_text, json_line

Boxes = Sequence[inference_pb2.Box]
FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_REPETITION: "repetition",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text of the user turn, after images and videos")
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help=f"an image file ({', '.join(IMAGE_FORMATS)}); may be repeated",
    )
    parser.add_argument(
        "--video",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="an MP4 or WebM file; may be repeated",
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="N",
        help="frames that are taken from a second of each video (default: the server's)",
    )
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FILE",
        help="write the last image with the boxes of the answer drawn on it, as PNG, JPEG or WebP",
    )
    add_client_arguments(parser)
    add_sampling_arguments(parser)
    add_stopping_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 always takes the most likely token (default: the model's own)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens that together have this probability",
    )
    parser.add_argument(
        "--top-k",
        type=whole_number(0, 2**31),
        metavar="N",
        help="sample from this number of most likely tokens; 0: from all",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**64 - 1),
        metavar="N",
        help="requests with the same seed get the same answer",
    )


def add_stopping_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1, 2**32 - 1),
        metavar="N",
        help="the longest answer (default: what is left of the context)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="continue past the model's end token"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="fail after this time")


def generate(arguments: argparse.Namespace) -> int:
    """Stream the answer to stdout, or print it whole with --json. Return the exit status."""
    return run_command(ask_and_draw, arguments)


def ask_and_draw(arguments: argparse.Namespace) -> None:
    ask = print_answer if arguments.json else stream_answer
    if arguments.draw is None:
        ask(arguments, [read_file(path) for path in arguments.image])
        return
    from services.commands.drawing import check_drawing, draw_boxes  # Pillow, only if needed

    if not arguments.image:
        raise ClientError("--draw needs an image to draw on: add --image FILE")
    check_drawing(arguments.draw)
    images = [read_file(path) for path in arguments.image]
    boxes = ask(arguments, images)
    number = draw_boxes(images, boxes, arguments.draw, arguments.seed or 0)
    print(f"twinlens: drew {number} boxes in {arguments.draw}", file=sys.stderr)


def print_answer(arguments: argparse.Namespace, images: list[bytes]) -> Boxes:
    """Print the whole answer as JSON, and return its boxes."""
    request = inference_pb2.GenerateRequest(**request_fields(arguments, images))
    with connect(arguments.grpc) as channel:
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
        "boxes": [as_dict(box) for box in response.boxes],
    }
    print(json_line(answer))
    return response.boxes


def stream_answer(arguments: argparse.Namespace, images: list[bytes]) -> Boxes:
    """Print the answer while it comes, and return its boxes."""
    request = inference_pb2.GenerateStreamRequest(**request_fields(arguments, images))
    boxes: Boxes = []
    with connect(arguments.grpc) as channel:
        for response in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
            request, timeout=arguments.timeout
        ):
            print(answer_text(response.delta.text), end="", flush=True)
            boxes = response.end.boxes
    print(flush=True)
    return boxes


def request_fields(arguments: argparse.Namespace, images: list[bytes]) -> dict[str, Any]:
    """Return the fields that GenerateRequest and GenerateStreamRequest share."""
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
        "images": [inference_pb2.Image(data=image) for image in images],
        "videos": [
            inference_pb2.Video(file=read_file(path), fps=arguments.fps) for path in arguments.video
        ],
        "sampling": inference_pb2.SamplingParams(**sampling),
        "stopping": inference_pb2.StoppingParams(**stopping),
    }
