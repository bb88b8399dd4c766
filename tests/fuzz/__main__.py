"""Fuzz the services in this process: `python -m tests.fuzz --seed 1 --messages 1000000`."""

import argparse
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.fuzz.jobs import BODIES, TARGETS, Job, run
from tests.fuzz.rounds import Result

PART = 10_000
"""How many messages or bodies one process sends with one seed."""
MAX_SHOWN_FAULTS = 10


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="1", help="what is random depends on it only")
    parser.add_argument("--messages", type=int, default=1_000_000, help="to all targets together")
    parser.add_argument("--bodies", type=int, default=100_000, help="of HTTP and gRPC requests")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser.parse_args()


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """Yield parts of the work. Each has a seed of its own."""
    counts = {name: options.messages // len(options.targets) for name in options.targets}
    for name, count in (counts | {BODIES: options.bodies}).items():
        for part, begin in enumerate(range(0, count, PART)):
            yield name, f"{options.seed}.{part}", min(PART, count - begin)


def show(name: str, result: Result) -> None:
    counts = ", ".join(f"{what} {count:,}" for what, count in sorted(result.counts.items()))
    print(f"{name}: {result.counts.total():,} ({counts}) in {result.seconds:.0f} s")
    for text in result.faults[:MAX_SHOWN_FAULTS]:
        print(f"  FAULT {text}")
    for text, count in result.unforeseen.items():
        print(f"  UNFORESEEN {count} x {text}")


def main() -> int:
    options = parse()
    results: defaultdict[str, Result] = defaultdict(Result)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs_of(options)]):
            (name, seed, _), result = done.result()
            result.faults = [f"seed {seed}, {fault}" for fault in result.faults]
            results[name].add(result)
    for name, result in results.items():
        show(name, result)
    total = Result()
    for result in results.values():
        total.add(result)
    messages = total.counts.total() - results[BODIES].counts.total()
    print(
        f"{messages:,} messages, {results[BODIES].counts.total():,} bodies, "
        f"{total.seconds:.0f} s of work, {len(total.faults)} faults, "
        f"{total.unforeseen.total()} unforeseen exceptions"
    )
    return 1 if total.faults or total.unforeseen else 0


if __name__ == "__main__":
    sys.exit(main())
