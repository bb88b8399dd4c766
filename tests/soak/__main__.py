"""Send thousands of requests of every kind while members are killed, frozen, drained and scaled.

    python -m tests.soak --requests 10000 --seed 1

The processes are the real ones. Every answer is compared with the undisturbed one. Prints a table
and a last line of JSON. The exit status is 1 if a request was lost, failed, answered twice or
answered differently, or if work or processes are left over at the end.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from tests.soak.faults import WEIGHTS
from tests.soak.run import Soak
from tests.soak.workload import POISONS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument(
        "--questions", type=int, help="how many requests differ (default: a fifth of the requests)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the requests and faults")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="how long to send requests, at most"
    )
    parser.add_argument(
        "--clients", type=int, default=24, help="how many requests are in flight at once"
    )
    parser.add_argument(
        "--fault-seconds",
        type=float,
        default=3.0,
        help="mean time between two faults; 0: no faults",
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        default=list(WEIGHTS),
        choices=list(WEIGHTS),
        help="kinds of faults (default: all)",
    )
    parser.add_argument(
        "--vision-ms", type=float, default=60.0, help="how long a simulated image takes"
    )
    parser.add_argument(
        "--poison-every",
        type=int,
        default=0,
        help="how many requests there are for each one that is a poison (default: none is)",
    )
    parser.add_argument(
        "--poisons",
        nargs="+",
        default=list(POISONS),
        choices=list(POISONS),
        help="kinds of poisons: a role that ends of it, or an attack on an API (default: all)",
    )
    parser.add_argument("--log", type=Path, help="file for the log of the disturbed system")
    return parser.parse_args()


def main() -> int:
    options = parse()
    report = asyncio.run(Soak(options).run())
    print(report.table())
    print(json.dumps(report.as_dict()))
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
