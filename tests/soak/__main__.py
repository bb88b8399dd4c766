"""Thousands of requests of every kind against the real processes, while members are killed, frozen,
drained and scaled.

    python -m tests.soak --requests 10000 --seed 1

Every answer is compared with the undisturbed one. Prints a table and a last line of JSON; the exit
status is 1 where a request was lost, failed, answered twice or differently, or where something is
left over at the end.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from tests.soak.faults import WEIGHTS
from tests.soak.run import Soak


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument(
        "--questions", type=int, help="different ones among the requests (default: a fifth of them)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of requests and faults")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="no new request after so many seconds"
    )
    parser.add_argument("--clients", type=int, default=24, help="requests under way at once")
    parser.add_argument(
        "--fault-seconds",
        type=float,
        default=3.0,
        help="between two faults, on the average; 0: none",
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        default=list(WEIGHTS),
        choices=list(WEIGHTS),
        help="which kinds (default: all)",
    )
    parser.add_argument(
        "--vision-ms", type=float, default=60.0, help="what a simulated image takes"
    )
    parser.add_argument("--log", type=Path, help="file for the disturbed system's log")
    return parser.parse_args()


def main() -> int:
    options = parse()
    report = asyncio.run(Soak(options).run())
    print(report.table())
    print(json.dumps(report.as_dict()))
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
