"""`twinlens verify`: whether a running system computes what the model's reference computes."""

import argparse
import importlib.util
import sys
from pathlib import Path

from common.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from services.commands.chat_client import DEFAULT_URL, KEY_VARIABLE, base_url
from services.commands.client import ClientError, positive, whole_number
from services.commands.output import one_line

DEFAULT_MAX_TOKENS = 16
DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="the model directory that the system serves; the reference reads its weights",
    )
    parser.add_argument(
        "--url",
        type=base_url,
        default=DEFAULT_URL,
        metavar="URL",
        help="the running system's OpenAI base URL (default: %(default)s); the variable "
        f"{KEY_VARIABLE} has its key, if it needs one",
    )
    parser.add_argument(
        "--served-model-name",
        default="",
        metavar="NAME",
        help="the model's name there (default: the first that it lists)",
    )
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="an image to ask about in place of the built-in ones; may be repeated",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1, 4096),
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="the tokens of each answer (default: %(default)s)",
    )
    add_bounds_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object as the last line, too"
    )


def add_bounds_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what the system computes in, which sets the bound; auto: the dtype of the checkpoint",
    )
    parser.add_argument(
        "--tolerance",
        type=positive,
        metavar="X",
        help="how far a log-probability may lie from the reference's (default: by --dtype)",
    )
    for name in ("min", "max"):
        parser.add_argument(
            f"--{name}-pixels",
            type=whole_number(1, 2**31),
            metavar="N",
            help=f"the --{name}-pixels that the system was started with",
        )


def check_packages() -> None:
    """Raise ClientError without torch, which every reference needs."""
    if not importlib.util.find_spec("torch"):
        raise ClientError(
            "the reference computes with torch: pip install 'twinlens[engine,reference]'"
        )


def verify(arguments: argparse.Namespace) -> int:
    """Compare, print, and return 0 within the bounds, 1 outside, and 2 if it is not known."""
    from common.checkpoint import BadCheckpoint

    try:
        check_packages()
        from services.commands.verification.run import print_findings

        return EXIT_OK if print_findings(arguments) else EXIT_FAILED
    except (BadCheckpoint, ClientError) as e:
        print(f"twinlens: {one_line(str(e))}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
