"""`twinlens bench`: measures how fast a server answers."""

import argparse
import math
import re
from pathlib import Path

from services.commands.chat_client import add_url_argument
from services.commands.client import address, positive, whole_number

BENCH_HELP = """Send requests about synthetic images to any server with OpenAI's HTTP interface, or
to Twinlens over gRPC, and measure the answers. The last line of stdout is one JSON object. Its
figures are those of the last level; `levels` has those of all."""
SLO_NAMES = ("ttft", "tpot", "e2e")
DEFAULT_REQUESTS = 20
REQUESTS_PER_CLIENT = 5


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = BENCH_HELP
    add_url_argument(parser)
    parser.add_argument(
        "--grpc", type=address, metavar="HOST:PORT", help="ask Twinlens over gRPC instead of --url"
    )
    add_load_arguments(parser)
    add_request_arguments(parser)
    parser.add_argument(
        "--slo",
        type=slo,
        default={},
        metavar="NAME=SECONDS,...",
        help="count the requests within these limits of ttft, tpot and e2e, such as "
        "ttft=2,tpot=0.1",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=600.0,
        metavar="SECONDS",
        help="a request that takes longer has failed (default: %(default)g)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write results.json, requests.jsonl and plots into this folder",
    )


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=numbers,
        default=[1],
        metavar="N,N",
        help="the requests in flight, one level after another (default: 1)",
    )
    load.add_argument(
        "--rate",
        type=positive,
        metavar="R",
        help="send this many requests a second at random times, whatever the answers do",
    )
    parser.add_argument(
        "--requests",
        type=whole_number(1, 10**7),
        metavar="N",
        help=f"the requests of each level (default: {REQUESTS_PER_CLIENT} times its concurrency, "
        f"at least {DEFAULT_REQUESTS})",
    )
    parser.add_argument(
        "--warmup",
        type=whole_number(0, 10**6),
        metavar="N",
        help="requests before each level that are not counted (default: as many as are in flight, "
        "4 with --rate)",
    )


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        type=image_size,
        default=(448, 448),
        metavar="WxH",
        help="the size of the images in pixels (default: 448x448)",
    )
    parser.add_argument(
        "--images",
        type=whole_number(0, 1000),
        default=1,
        metavar="N",
        help="the images in each request (default: %(default)s)",
    )
    parser.add_argument(
        "--image-format", choices=("jpeg", "png"), default="jpeg", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--same",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="the share of images that repeat an earlier one, from 0 to 1 (default: 0)",
    )
    parser.add_argument(
        "--prompt-words",
        type=whole_number(1, 10**6),
        default=16,
        metavar="N",
        help="random words after the images, about one token each (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1, 10**6),
        default=64,
        metavar="N",
        help="the tokens of each answer (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        metavar="N",
        help="makes the same images, words and times again (default: other ones in each run)",
    )


def numbers(text: str) -> list[int]:
    """Return a list of positive numbers separated by commas; an argparse type."""
    return [whole_number(1, 100_000)(part) for part in text.split(",")]


def share(text: str) -> float:
    """Return a number from 0 to 1; an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def image_size(text: str) -> tuple[int, int]:
    """Return (width, height) of a text like 448x336; an argparse type."""
    if not (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} does not have the form WIDTHxHEIGHT")
    return int(found[1]), int(found[2])


def slo(text: str) -> dict[str, float]:
    """Return the limits by name; an argparse type."""
    limits = {}
    for part in text.split(","):
        name, _, seconds = part.partition("=")
        if name not in SLO_NAMES:
            raise argparse.ArgumentTypeError(
                f"{part!r} does not have the form NAME=SECONDS, with {', '.join(SLO_NAMES)} as NAME"
            )
        limits[name] = positive(seconds)
    return limits


def bench(arguments: argparse.Namespace) -> int:
    """Run a load test and print its results. Return the exit status."""
    from services.commands.bench.run import run_bench  # slow to import

    return run_bench(arguments)
